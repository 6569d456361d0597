"""Workload profiles: named choices of history lengths, candidates and item popularity.

Table sizes are not part of a profile: they come from the model that the requests are for.
"""

from __future__ import annotations

from dataclasses import dataclass

from hstu_trt.bench.workloads.lengths import ConstLengths, LengthLaw, QuantileLengths, StreamLengths
from hstu_trt.contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a workload looks like."""

    name: str
    lengths: LengthLaw
    candidates: tuple[int, ...]
    """Candidates per request; each request draws one of these counts."""
    zipf: float
    """Exponent of the item popularity; 0 is uniform."""
    users: int
    requests: int
    """At most this many: a ``StreamLengths`` law may yield fewer."""

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 1:
            raise ConfigError(f"profile {self.name}: needs candidate counts >= 1, got {self.candidates}")


def ci() -> Profile:
    """Short e-commerce histories with every edge length, for a model that two CPU cores serve."""
    force = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256)
    lengths = QuantileLengths(scale=0.03125, maximum=256, force=force)
    return Profile(name="ci", lengths=lengths, candidates=(32,), zipf=1.05, users=500, requests=256)


def gpu_point() -> Profile:
    """One measuring point: 7,000 events and 2,048 candidates in every request."""
    lengths = ConstLengths(value=7000)
    return Profile(name="gpu_point", lengths=lengths, candidates=(2048,), zipf=1.05, users=2000, requests=256)


def gpu_ecom() -> Profile:
    """Heavy-tailed e-commerce histories: the case that padding cannot serve."""
    lengths = QuantileLengths(maximum=8192)
    return Profile(name="gpu_ecom", lengths=lengths, candidates=(512, 2048), zipf=1.05, users=20_000, requests=20_000)


def gpu_mlperf() -> Profile:
    """The length process and uniform items of MLPerf's DLRMv3 data set, for 2,000 users."""
    lengths = StreamLengths()
    return Profile(name="gpu_mlperf", lengths=lengths, candidates=(2048,), zipf=0.0, users=2000, requests=14_000)


PROFILES = {"ci": ci, "gpu_point": gpu_point, "gpu_ecom": gpu_ecom, "gpu_mlperf": gpu_mlperf}
