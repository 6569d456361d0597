"""The one interface behind which every engine runs: ONNX Runtime, PyTorch, TensorRT, TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, runtime_checkable

from numpy.typing import NDArray

from hstu_trt.contract.tensors import StageSpec


@runtime_checkable
class Runner(Protocol):
    """Executes one stage. Use it as a context manager; ``infer`` may be called any number of times inside."""

    spec: StageSpec
    """What ``infer`` takes and returns."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Runs the stage on numpy arrays: inputs by name -> outputs by name."""
        ...
