"""The ONNX Runtime runner: any stage of a model folder, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError
from hstu_trt.contract.features import check_request
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.contract.split_users import ATTENTION_STAGES, infer_per_user
from hstu_trt.contract.tensors import TensorSpec
from hstu_trt.engines.stages import check_feed, engine_spec

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
_LOG_FATAL_ONLY = 4
# ONNX Runtime's rewriting of QuantizeLinear and DequantizeLinear pairs is made for integers: with e4m3 it fails to find
# kernels, or answers wrongly.
_KEEP_QUANTISATION = ("session.disable_quant_qdq", "1")
_NO_SPINNING = ("session.intra_op.allow_spinning", "0")
_SMALL_PRODUCT = 20_000_000
"""Multiply-adds that one core does in about a millisecond."""


class OnnxRuntimeRunner:
    """Executes one stage; a ``contract.runner.Runner``. Threads may share it.

    threads: of one operator; ``None`` leaves the choice to ONNX Runtime (all cores).
    users_at_once: with ``per_user``, so many users run side by side, each with ``threads`` of its own.
    spin: whether threads of the session wait for work at full load, which costs other processes their time.
    per_user: run the users of a batch one by one in the stages with attention, which is dense over a batch in the
    function body (see ``split_users``); scores agree with a batched run within the stage's tolerance.
    Raises ArtefactError when the stage's file is missing, damaged or has other inputs and outputs than the contract.
    """

    def __init__(
        self,
        model: ModelFolder,
        stage: str,
        *,
        threads: int | None = None,
        per_user: bool = True,
        users_at_once: int = 1,
        spin: bool = True,
    ) -> None:
        if (threads is not None and threads < 1) or users_at_once < 1:
            raise ConfigError(f"threads and users at once must be >= 1, got {threads} and {users_at_once}")
        self.spec = engine_spec(model, stage)
        self._limits = model.limits
        self._slots = len(model.ranking_config.contextual_slots) if stage in ATTENTION_STAGES else 0
        self._splits = per_user and stage in ATTENTION_STAGES
        self._session = _open_session(model, stage, threads, spin=spin)
        self._pool = ThreadPoolExecutor(users_at_once, "users") if users_at_once > 1 and self._splits else None
        _check_ports(model, stage, "input", self._session.get_inputs(), self.spec.inputs)
        _check_ports(model, stage, "output", self._session.get_outputs(), self.spec.outputs)

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads; the session goes with the runner."""
        if self._pool is not None:
            self._pool.shutdown()

    def infer(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Runs the stage: inputs by name -> outputs by name.

        Raises InputError when the feed does not fit the stage, HstuTrtError when ONNX Runtime fails.
        """
        check_feed(feed, self.spec)
        check_request(feed, self.spec, self._limits)
        if not self._splits:
            return self._run(feed)
        return infer_per_user(self._run, feed, self._slots, map if self._pool is None else self._pool.map)

    @classmethod
    def for_serving(cls, model: ModelFolder, stage: str) -> OnnxRuntimeRunner:
        """As a server needs it, where every stage is a process and requests overlap.

        Operators of a small model last microseconds, and handing them to threads costs more than they do: on two cores
        a request of the test model took 2.6 ms of CPU time with two spinning threads and 0.7 ms with one. There each
        operator has one thread, and the users of a batch run side by side.
        """
        if _product_of_layer(model) > _SMALL_PRODUCT:
            return cls(model, stage, spin=False)
        return cls(model, stage, threads=1, users_at_once=len(os.sched_getaffinity(0)), spin=False)

    def _run(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        try:
            values = self._session.run(None, dict(feed))
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise HstuTrtError(f"stage {self.spec.name}: ONNX Runtime failed: {_first_line(error)}") from error
        return {spec.name: value for spec, value in zip(self.spec.outputs, values, strict=True)}


def _product_of_layer(model: ModelFolder) -> int:
    """Multiply-adds of a layer's projection to u, v, q and k for the longest history."""
    config = model.ranking_config
    return model.limits.history * config.model_dim * 2 * config.heads * (config.qk_dim + config.v_dim)


def _open_session(model: ModelFolder, stage: str, threads: int | None, *, spin: bool) -> Any:
    path, remedy = model.onnx(stage), f"make it again with: {REGENERATE.format(folder=model.path)}"
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; {remedy}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    if model.precision == "fp8":
        options.add_session_config_entry(*_KEEP_QUANTISATION)
    if not spin:
        options.add_session_config_entry(*_NO_SPINNING)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ArtefactError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}; {remedy}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _check_ports(
    model: ModelFolder, stage: str, kind: str, found: Sequence[Any], expected: Sequence[TensorSpec]
) -> None:
    """Compares a session's inputs or outputs with the contract: names, and in the outputs their order; dtypes; dims."""
    path, names = model.onnx(stage), [port.name for port in found]
    wanted = [spec.name for spec in expected]
    if names != wanted and (kind == "output" or sorted(names) != sorted(wanted)):
        raise ArtefactError(
            f"{path}: its {kind}s are {', '.join(names)}, the contract says {', '.join(wanted)}; "
            f"make it again with: {REGENERATE.format(folder=model.path)}"
        )
    ports = {port.name: port for port in found}
    for spec in expected:
        port = ports[spec.name]
        dims = [dim if isinstance(dim, int) else None for dim in spec.dims]
        shape = [dim if isinstance(dim, int) else None for dim in port.shape]
        fits = len(dims) == len(shape) and all(
            a == b or (kind == "output" and b is None) for a, b in zip(dims, shape, strict=True)
        )
        if _DTYPES.get(port.type) != spec.dtype or not fits:
            raise ArtefactError(
                f"{path}: {kind} {spec.name!r} is {port.type} {list(port.shape)}, "
                f"the contract says {spec.dtype} {spec.shape_text}; "
                f"make it again with: {REGENERATE.format(folder=model.path)}"
            )
