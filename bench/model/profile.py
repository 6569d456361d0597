"""Where a forward's time goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention_kernel", "cluster_kernel", "plan_kernel", "pack_values")),
    ("layer kernels", ("norm_rows", "gate<", "quantise_rows", "encode_tokens", "user_vectors", "scores<")),
    ("lookup", ("plain_kernel", "staged_kernel", "latch_kernel")),
    ("products", ("project_kernel", "gemm", "nvjet", "cutlass", "cublas", "splitKreduce", "Kernel2")),
    ("copies", ("Memcpy", "Memset", "memcpy", "memset")),
)
OTHER = "other"


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a forward."""

    name: str
    kind: str
    launches: float
    us: float


@dataclass(frozen=True)
class Breakdown:
    """The kernels of a forward, longest first."""

    kernels: tuple[KernelTime, ...]

    def by_kind(self) -> Mapping[str, float]:
        """Microseconds by kind."""
        kinds = [*(kind for kind, _ in _KINDS), OTHER]
        return {kind: sum(k.us for k in self.kernels if k.kind == kind) for kind in kinds}

    @property
    def floor_us(self) -> float:
        """What products and attention take: the rest is traffic that fusion could take away."""
        kinds = self.by_kind()
        return kinds["attention"] + kinds["products"]

    def text(self, forwards: str) -> str:
        """A table for people."""
        lines = [f"{forwards}: kernels {sum(k.us for k in self.kernels):.0f} us"]
        lines += [f"  {kind:<14} {us:9.1f} us" for kind, us in self.by_kind().items() if us]
        lines += [f"    {k.us:9.1f} us {k.launches:6.1f} x  {k.kind:<13} {k.name[:110]}" for k in self.kernels[:28]]
        return "\n".join(lines)


def profile(forward: Callable[[], object], repeats: int = 5) -> Breakdown:
    """The kernels of a forward, averaged over some repeats."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    forward()
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            forward()
        torch.cuda.synchronize()
    times = [
        KernelTime(event.key, _kind(event.key), event.count / repeats, event.self_device_time_total / repeats)
        for event in found.key_averages()
        if event.self_device_time_total
    ]
    return Breakdown(tuple(sorted(times, key=lambda time: -time.us)))


def _kind(kernel: str) -> str:
    return next((kind for kind, parts in _KINDS if any(part in kernel for part in parts)), OTHER)
