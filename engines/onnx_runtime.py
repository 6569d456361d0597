"""The ONNX Runtime runner: any stage of a model folder, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError, InputError
from hstu_trt.contract.features import check_request
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.contract.split_users import ATTENTION_STAGES, infer_per_user
from hstu_trt.contract.tensors import StageSpec, TensorSpec
from hstu_trt.engines.stages import engine_spec

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
_LOG_FATAL_ONLY = 4
# ONNX Runtime's rewriting of QuantizeLinear and DequantizeLinear pairs is made for integers: with e4m3 it fails to find
# kernels, or answers wrongly.
_KEEP_QUANTISATION = ("session.disable_quant_qdq", "1")


class OnnxRuntimeRunner:
    """Executes one stage; a ``contract.runner.Runner``. Threads may share it.

    threads: of one operator; ``None`` leaves the choice to ONNX Runtime (all cores).
    per_user: run the users of a batch one by one in the stages with attention, which is dense over a batch in the
    function body (see ``split_users``); scores agree with a batched run within the stage's tolerance.
    Raises ArtefactError when the stage's file is missing, damaged or has other inputs and outputs than the contract.
    """

    def __init__(self, model: ModelFolder, stage: str, *, threads: int | None = None, per_user: bool = True) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be >= 1, got {threads}")
        self.spec = engine_spec(model, stage)
        self._limits = model.limits
        self._slots = len(model.ranking_config.contextual_slots) if stage in ATTENTION_STAGES else 0
        self._splits = per_user and stage in ATTENTION_STAGES
        self._session = _open_session(model, stage, threads)
        _check_ports(model, stage, "input", self._session.get_inputs(), self.spec.inputs)
        _check_ports(model, stage, "output", self._session.get_outputs(), self.spec.outputs)

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: the session goes with the runner."""

    def infer(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Runs the stage: inputs by name -> outputs by name.

        Raises InputError when the feed does not fit the stage, HstuTrtError when ONNX Runtime fails.
        """
        check_feed(feed, self.spec)
        check_request(feed, self.spec, self._limits)
        return infer_per_user(self._run, feed, self._slots) if self._splits else self._run(feed)

    def _run(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        try:
            values = self._session.run(None, dict(feed))
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise HstuTrtError(f"stage {self.spec.name}: ONNX Runtime failed: {_first_line(error)}") from error
        return {spec.name: value for spec, value in zip(self.spec.outputs, values, strict=True)}


def check_feed(feed: Mapping[str, NDArray], spec: StageSpec) -> None:
    """Refuses tensors that the stage does not know: a misspelt optional one would go unnoticed."""
    known = {tensor.name for tensor in spec.inputs}
    for name in feed:
        if name not in known:
            raise InputError(f"stage {spec.name} takes no tensor {name!r}; it takes {', '.join(sorted(known))}")


def _open_session(model: ModelFolder, stage: str, threads: int | None) -> Any:
    path, remedy = model.onnx(stage), f"make it again with: {REGENERATE.format(folder=model.path)}"
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; {remedy}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    if model.precision == "fp8":
        options.add_session_config_entry(*_KEEP_QUANTISATION)
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
