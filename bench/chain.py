"""Runs the stages of a ranking model one after the other, whoever executes them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.features import Tensors, batch_max_norm
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.runner import Runner
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, StageSpec

RUNNERS = ("torch", "cuda", "onnxruntime", "tensorrt", "tensorrt_rtx")
NORM = "attention_norm"


def open_runner(
    kind: str, model: ModelFolder, stage: str, device: str | None = None, engines: Path | None = None
) -> Runner:
    """A runner for one stage.

    ``torch`` is the PyTorch model, on a CUDA GPU on our kernels where their library is there. ``cuda`` is the model on
    our kernels alone, on the GPU; on the device "cpu" it runs their plain versions. ``onnxruntime`` executes the ONNX
    file on the CPU. ``tensorrt`` and ``tensorrt_rtx`` execute engines on the GPU: those in the folder ``engines``, else
    where `make engines` puts them for the GPU here. device: None is the runner's own, "cuda" for ``cuda``, else "cpu".
    """
    if kind == "cuda":
        from hstu_trt.engines.cuda.runner import CudaOptions, CudaRunner

        # Without a GPU, attention is the plain op of the model's room.
        importlib.import_module("hstu_trt.export.torch_ops")
        return CudaRunner(model, stage, CudaOptions(device=device or "cuda"))
    device = device or "cpu"
    if kind in ("tensorrt", "tensorrt_rtx"):
        from hstu_trt.engines.tensorrt_runner import open_engine_runner

        return open_engine_runner(kind, model, stage, engines)
    if kind == "torch":
        from hstu_trt.export.torch_runner import TorchRunner

        if device.startswith("cuda"):
            use_kernels()
        return TorchRunner(model, stage, device=device)
    if device != "cpu":
        raise ConfigError(f"runner {kind!r} runs on the CPU only; device {device!r} goes with torch")
    if kind == "onnxruntime":
        from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(model, stage)
    raise ConfigError(f"unknown runner {kind!r}: choose from {', '.join(RUNNERS)}")


@functools.cache
def use_kernels() -> bool:
    """Registers our CUDA kernels behind the torch ops, once for the process; says so if they are not built.

    Only bench knows both rooms: the model's (export) and the kernels' (plugins).
    """
    from hstu_trt.plugins.library import load_library

    try:
        load_library()
    except ArtefactError as error:
        print(f"note: attention runs in plain PyTorch, not on our kernels: {error}", file=sys.stderr)
        return False
    importlib.import_module("hstu_trt.plugins.torch_ops")
    return True


class Composed:
    """A runner made of runners, which it opens and closes; takes the inputs of ``ranking`` and ``attention_norm``."""

    spec: StageSpec

    def __init__(self, parts: Sequence[Runner]) -> None:
        self.parts = parts
        self._open = ExitStack()

    def __enter__(self) -> Composed:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        raise NotImplementedError


class Chain(Composed):
    """Three runners in a row, as the ensemble runs them: embedding lookup, hstu (or hstu_taps), mlp_head.

    Takes the inputs of the ``ranking`` stage and ``attention_norm``; answers every tensor that a stage gave.
    """

    def __init__(self, model: ModelFolder, stages: Sequence[Runner]) -> None:
        super().__init__(stages)
        self.spec = _with_norm(model)

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        known, answers = dict(feed), {}
        for stage in self.parts:
            made = stage.infer({tensor.name: known[tensor.name] for tensor in stage.spec.inputs})
            known.update(made)
            answers.update(made)
        return answers


class Fused(Composed):
    """The ``ranking_fused`` stage behind the inputs of ``ranking``: ids are laid end to end."""

    def __init__(self, model: ModelFolder, fused: Runner) -> None:
        super().__init__([fused])
        self.spec = _with_norm(model)

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        (fused,) = self.parts
        return fused.infer(
            {t.name: feed[t.name].reshape(-1) if len(t.dims) == 1 else feed[t.name] for t in fused.spec.inputs}
        )


def _with_norm(model: ModelFolder) -> StageSpec:
    ranking, fused = model.specs[ENSEMBLE], model.specs[FUSED]
    return StageSpec(ENSEMBLE, (*ranking.inputs, fused.tensor(NORM)), ranking.outputs)


def norm_tensor(norm: float | None, config: HstuConfig, packed: Mapping[str, NDArray]) -> NDArray:
    """``attention_norm`` float32 [1] for a packed request."""
    return np.array([batch_max_norm(config, packed) if norm is None else norm], dtype=np.float32)


def reference_token_order(config: HstuConfig, packed: Mapping[str, NDArray]) -> NDArray:
    """Index that brings split tokens into the reference's order.

    Ours: all prefixes (contextual + history), then all candidates. The reference's: per user contextual, history,
    candidates. Returns int64 [tokens]: ``ours[index]`` is in the reference's order.
    """
    history, candidates = (packed[name].astype(np.int64) for name in ("uih_offsets", "candidate_offsets"))
    prefix = history + len(config.contextual_slots) * np.arange(len(history))
    users = range(len(history) - 1)
    runs = [
        np.arange(start, stop)
        for user in users
        for start, stop in (
            (prefix[user], prefix[user + 1]),
            (prefix[-1] + candidates[user], prefix[-1] + candidates[user + 1]),
        )
    ]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
