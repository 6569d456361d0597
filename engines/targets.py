"""What engines can be built for."""

from __future__ import annotations

from dataclasses import dataclass

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.tensors import PRECISIONS, Precision


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """A GPU, or the CPU, that engines are built for."""

    name: str
    precisions: tuple[Precision, ...]
    builders: tuple[str, ...]
    """Names of the builders that can serve it, the best first."""


def cpu() -> GpuTarget:
    """Any machine: the ONNX files in ONNX Runtime."""
    return GpuTarget(name="cpu", precisions=PRECISIONS, builders=("onnxruntime",))


TARGETS = {"cpu": cpu}


def find_target(name: str) -> GpuTarget:
    """A target by name. Raises ConfigError."""
    if name not in TARGETS:
        raise ConfigError(f"no target {name!r} yet: {', '.join(TARGETS)} is the only one so far; GPU targets follow")
    return TARGETS[name]()
