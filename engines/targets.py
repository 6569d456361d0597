"""What engines can be built for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.tensors import PRECISIONS, Precision

AMPERE = 80
"""Compute capability from which on GPUs share engines that were built so."""
_FP8_FROM = 89
"""Compute capability with fp8 tensor cores: Ada and later."""


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """A GPU, or the CPU, that engines are built for."""

    name: str
    title: str
    """Words of the device name that the driver reports."""
    compute_capability: int
    """Ten times the compute capability, as in 89 for 8.9; 0 for the CPU."""
    memory_gib: int
    builders: tuple[str, ...]
    """Names of the builders that can serve it; the first is the default."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that the GPU computes in; on the CPU, all."""
        if not self.compute_capability:
            return PRECISIONS
        return ("fp32", "fp16", "fp8") if self.compute_capability >= _FP8_FROM else ("fp32", "fp16")

    def is_device(self, device_name: str) -> bool:
        """Whether the driver's name of a device names this GPU."""
        return set(self.title.upper().split()) <= set(re.findall(r"[A-Z0-9]+", device_name.upper()))


_AHEAD = ("tensorrt_rtx", "tensorrt")
"""GPUs that TensorRT-RTX compiles for ahead of time: it comes first, since it needs no GPU."""
_ON_DEVICE = ("tensorrt",)

# name, title, compute capability, memory in GiB (the largest variant that is common), builders.
# Our kernels begin at compute capability 8.0, so the T4 has no plugins, and no builder "tensorrt".
_GPUS = (
    ("t4", "T4", 75, 16, ("tensorrt_rtx",)),
    ("a10", "A10", 86, 24, _AHEAD),
    ("a100", "A100", 80, 80, _AHEAD),
    ("l4", "L4", 89, 24, _AHEAD),
    ("l20", "L20", 89, 48, _AHEAD),
    ("l40s", "L40S", 89, 48, _AHEAD),
    ("rtx4090", "RTX 4090", 89, 24, _AHEAD),
    ("h100", "H100", 90, 80, _ON_DEVICE),
    ("h200", "H200", 90, 141, _ON_DEVICE),
    ("b200", "B200", 100, 180, _ON_DEVICE),
    ("rtxpro6000", "RTX PRO 6000", 120, 96, _AHEAD),
)
CPU = GpuTarget(name="cpu", title="any CPU", compute_capability=0, memory_gib=0, builders=("onnxruntime",))
TARGETS = {
    "cpu": CPU,
    **{
        name: GpuTarget(name=name, title=title, compute_capability=capability, memory_gib=memory, builders=builders)
        for name, title, capability, memory, builders in _GPUS
    },
}


def find_target(name: str) -> GpuTarget:
    """A target by name. Raises ConfigError."""
    if name not in TARGETS:
        raise ConfigError(f"no target {name!r}: choose from {', '.join(TARGETS)} (hstu-trt engines --list)")
    return TARGETS[name]


def target_of_device(device_name: str) -> GpuTarget | None:
    """The preset for a device as its driver names it; None where there is none."""
    return next((target for target in TARGETS.values() if target.is_device(device_name)), None)


def capability_text(capability: int) -> str:
    """As in ``8.9``."""
    return f"{capability // 10}.{capability % 10}" if capability else "-"
