"""Queues in front of a batching server, simulated: what latency a rate costs, from measured service times.

A server takes all requests that wait, up to its largest batch, as soon as it is free, and serves them together, as
Triton's dynamic batching without delay. An ensemble is a row of such servers, each with its own queue. Service times
are those that Triton's statistics gave for each batch size; between measured sizes they are interpolated, beyond the
largest one they go on with the last slope. Their scatter, which comes from unequal histories, is log-normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.load.client import poisson
from hstu_trt.bench.load.scenarios import Bound, highest_rate
from hstu_trt.contract.errors import ConfigError

_MOST_LATENCY_S = 60.0
_Z90 = 1.2816


@dataclass(frozen=True, kw_only=True)
class ServiceCurve:
    """Seconds that a batch holds a server, by batch size."""

    seconds: Mapping[int, float]
    max_batch: int = 1
    scatter: float = 0.0
    """Sigma of the logarithm of one request's service time."""
    servers: int = 1
    """Instances that share the queue."""

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds.values()) <= 0 or self.max_batch < 1 or self.servers < 1:
            raise ConfigError(f"a service curve needs positive times, a batch and a server, got {self}")

    def at(self, batch: int) -> float:
        """Mean service time of a batch size."""
        sizes = sorted(self.seconds)
        if len(sizes) > 1 and batch > sizes[-1]:
            low, high = sizes[-2:]
            slope = (self.seconds[high] - self.seconds[low]) / (high - low)
            return self.seconds[high] + max(0.0, slope) * (batch - high)
        if len(sizes) == 1:
            return self.seconds[sizes[0]] * batch / sizes[0]
        return float(np.interp(batch, sizes, [self.seconds[size] for size in sizes]))


def fit_curve(batches: Sequence[Mapping[str, Sequence[float]]], *, max_batch: int, scatter: float) -> ServiceCurve:
    """A curve from ``batches`` of ``triton_statistics`` facts: size -> (executions, milliseconds each)."""
    count: dict[int, float] = {}
    total: dict[int, float] = {}
    for table in batches:
        for size, (executions, ms) in table.items():
            count[int(size)] = count.get(int(size), 0.0) + executions
            total[int(size)] = total.get(int(size), 0.0) + executions * ms / 1e3
    if not count:
        raise ConfigError("the rows hold no batch of Triton's statistics to take service times from")
    # Sizes that occurred once or twice would bend the curve by chance.
    often = {size: n for size, n in count.items() if n >= min(5.0, max(count.values()))}
    return ServiceCurve(
        seconds={size: total[size] / count[size] for size in often}, max_batch=max_batch, scatter=scatter
    )


def scatter_of(p50: float, p90: float) -> float:
    """Sigma of the log-normal law with these percentiles."""
    return math.log(p90 / p50) / _Z90 if p90 > p50 > 0 else 0.0


def simulate(arrivals: NDArray, curves: Sequence[ServiceCurve], *, overhead_s: float = 0.0, seed: int = 1) -> NDArray:
    """Latencies in seconds of requests that arrive at those moments and pass the curves' servers one after the other.

    arrivals: ascending seconds float64 [requests]. overhead_s: added to each, for the network and the client.
    Returns float64 [requests], in the order of arrival.
    """
    rng = np.random.default_rng(seed)
    moments, order = arrivals, np.arange(len(arrivals))
    for curve in curves:
        left = _serve(moments, curve, rng)
        by_departure = np.argsort(left, kind="stable")
        moments, order = left[by_departure], order[by_departure]
    latency = np.empty_like(moments)
    latency[order] = moments
    return latency - arrivals + overhead_s


def _serve(arrivals: NDArray, curve: ServiceCurve, rng: np.random.Generator) -> NDArray:
    """When each request leaves one stage."""
    free = [float(arrivals[0])] * curve.servers
    left = np.empty(len(arrivals))
    noise = rng.standard_normal(len(arrivals))
    first, moments = 0, arrivals.tolist()
    while first < len(moments):
        server = min(range(curve.servers), key=free.__getitem__)
        begin = max(free[server], moments[first])
        waiting = int(np.searchsorted(arrivals, begin, side="right"))
        last = min(max(waiting, first + 1), first + curve.max_batch)
        batch = last - first
        sigma = curve.scatter / math.sqrt(batch)
        end = begin + curve.at(batch) * math.exp(sigma * float(noise[first]) - sigma * sigma / 2)
        left[first:last] = end
        free[server] = end
        first = last
        if end - moments[min(last, len(moments) - 1)] > _MOST_LATENCY_S:
            left[last:] = np.inf
            return left
    return left


def predict_ms(
    curves: Sequence[ServiceCurve], rate: float, *, overhead_s: float, requests: int = 20_000, seed: int = 1
) -> dict[str, float]:
    """p50, p90 and p99 in ms at a rate of Poisson arrivals."""
    latency = simulate(poisson(rate, requests / rate, seed), curves, overhead_s=overhead_s, seed=seed)
    return {f"p{p}": float(np.percentile(latency, p)) * 1e3 for p in (50, 90, 99)}


def rate_within(curves: Sequence[ServiceCurve], bound: Bound, *, overhead_s: float) -> float:
    """The highest rate at which the simulated latency keeps a bound on p50, p90 or p99."""

    def holds(rate: float) -> bool:
        return predict_ms(curves, rate, overhead_s=overhead_s)[f"p{bound.percentile:g}"] <= bound.ms

    slowest = max(curve.at(curve.max_batch) / curve.max_batch / curve.servers for curve in curves)
    return highest_rate(holds, 0.5 / slowest, 0.02)
