"""Length laws: how many history events the requests of a workload have.

``StreamLengths`` is the process behind MLPerf's DLRMv3 data set, ``QuantileLengths`` the heavy-tailed table of an
e-commerce site, ``ConstLengths`` one length for a clean measuring point. ``draw_lengths`` turns a law into a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConstLengths:
    """Every history has ``value`` events."""

    value: int


@dataclass(frozen=True, kw_only=True)
class StreamLengths:
    """Histories that grow with time: a base chunk, and one chunk per time slot in which the user was active.

    A user sends a request in each inference slot in which he is active; the history then holds all earlier chunks.
    """

    chunk_mean: float = 100.0
    chunk_sd: float = 25.0
    chunk_min: int = 33
    p_active: float = 0.7
    train_slots: int = 90
    infer_slots: int = 10


@dataclass(frozen=True, kw_only=True)
class QuantileLengths:
    """Sum of half-year counts of clicks and of exposures without click, joined by a Gaussian copula.

    The two marginals stand in ``CLICK_BINS`` and ``EXPOSURE_BINS``.
    """

    copula_rho: float = 0.7
    """Correlation of the two normal scores; our assumption, the source has only the marginals."""
    scale: float = 1.0
    """Factor on the sum, before the bounds."""
    minimum: int = 1
    maximum: int
    force: tuple[int, ...] = ()
    """Lengths that must occur, at random requests: empty histories and the edges of kernel tiles."""


LengthLaw = ConstLengths | StreamLengths | QuantileLengths

# 20 bins of equal population: smallest, mean and largest count in the bin.
_Bins = tuple[tuple[int, float, int], ...]
CLICK_BINS: _Bins = (
    (1, 1.0, 1), (1, 1.0, 1), (1, 1.0, 1), (1, 1.6254, 2), (2, 2.0, 2),
    (2, 2.695, 3), (3, 3.3139, 4), (4, 4.2388, 5), (5, 5.3617, 6), (6, 6.6228, 7),
    (7, 8.4193, 9), (9, 10.5458, 12), (12, 13.2762, 15), (15, 16.8728, 19), (19, 21.7496, 25),
    (25, 28.6498, 33), (33, 39.0098, 46), (46, 56.2447, 69), (69, 91.0511, 122), (122, 263.2558, 21684),
)  # fmt: skip
EXPOSURE_BINS: _Bins = (
    (1, 1.0, 1), (1, 1.8875, 3), (3, 3.0, 3), (3, 3.7358, 5), (5, 5.5361, 6),
    (6, 7.5543, 9), (9, 10.4457, 12), (12, 14.4942, 17), (17, 20.1132, 24), (24, 28.0196, 33),
    (33, 39.0745, 46), (46, 54.6885, 64), (64, 76.8907, 91), (91, 108.6881, 129), (129, 155.1152, 185),
    (185, 225.0909, 272), (272, 336.8879, 415), (415, 534.0984, 685), (685, 956.4843, 1348),
    (1348, 3110.2403, 231863),
)  # fmt: skip
# Exponent of the truncated Pareto law in the last bin, solved for that bin's mean.
CLICK_TAIL = 1.844
EXPOSURE_TAIL = 1.735


@dataclass(frozen=True, kw_only=True)
class LengthPlan:
    """Who asks when, with how long a history: one entry per request, in order of time, shuffled within a slot."""

    stream: NDArray
    """int64 [requests]: the event stream that the history is a prefix of; requests of one stream share events."""
    length: NDArray
    """int64 [requests]: history events."""
    slot: NDArray
    """int64 [requests]: time slot."""


def draw_lengths(law: LengthLaw, rng: np.random.Generator, *, requests: int, users: int) -> LengthPlan:
    """Draws a plan of (for ``StreamLengths``, at most) ``requests`` requests; ``users`` counts the event streams."""
    if requests < 1 or users < 1:
        raise ConfigError(f"a workload needs at least one request and one user, got {requests} and {users}")
    if isinstance(law, StreamLengths):
        return _draw_stream(law, rng, requests, users)
    if isinstance(law, ConstLengths):
        lengths = np.full(requests, law.value, dtype=np.int64)
    else:
        lengths = _draw_quantile(law, rng, requests)
    return LengthPlan(stream=np.arange(requests), length=lengths, slot=np.zeros(requests, dtype=np.int64))


def _draw_stream(law: StreamLengths, rng: np.random.Generator, requests: int, users: int) -> LengthPlan:
    slots = law.train_slots + law.infer_slots
    chunks = np.rint(rng.normal(law.chunk_mean, law.chunk_sd, (users, 1 + slots)))
    chunks = np.maximum(chunks, law.chunk_min).astype(np.int64)
    active = rng.random((users, slots)) < law.p_active
    seen = np.concatenate([chunks[:, :1], chunks[:, 1:] * active], axis=1).cumsum(axis=1)
    user, late = np.nonzero(active[:, law.train_slots :])
    kept = rng.permutation(len(user))[:requests]
    slot = late[kept] + law.train_slots
    kept, slot = kept[np.argsort(slot, kind="stable")], np.sort(slot)
    return LengthPlan(stream=user[kept], length=seen[user[kept], slot], slot=slot)


def _draw_quantile(law: QuantileLengths, rng: np.random.Generator, requests: int) -> NDArray:
    from scipy.special import ndtr

    first, second = rng.standard_normal((2, requests))
    second = law.copula_rho * first + np.sqrt(1.0 - law.copula_rho**2) * second
    events = sample_bins(CLICK_BINS, CLICK_TAIL, ndtr(first)) + sample_bins(EXPOSURE_BINS, EXPOSURE_TAIL, ndtr(second))
    lengths = np.clip(np.rint(events * law.scale).astype(np.int64), law.minimum, law.maximum)
    forced = np.asarray(law.force[:requests], dtype=np.int64)
    lengths[rng.permutation(requests)[: len(forced)]] = forced
    return lengths


def sample_bins(bins: _Bins, tail: float, u: NDArray) -> NDArray:
    """Inverse CDF of a 20-bin table: uniform ``u`` in [0, 1) -> int64 counts >= 1.

    A bin holds ``m + (M - m) * v**k`` with k set by the bin's mean; the last one a Pareto law truncated to [m, M].
    """
    smallest, mean, largest = (np.array(column, dtype=np.float64) for column in zip(*bins, strict=True))
    scaled = np.clip(u, 0.0, np.nextafter(1.0, 0.0)) * len(bins)
    b = np.floor(scaled).astype(np.int64)
    v = scaled - b
    spread = mean > smallest
    k = np.where(spread, (largest - smallest) / np.where(spread, mean - smallest, 1.0) - 1.0, np.inf)
    body = smallest[b] + (largest - smallest)[b] * np.where(spread[b], v ** k[b], 0.0)
    m, top = smallest[-1], largest[-1]
    pareto = m * (1.0 - v * (1.0 - (m / top) ** tail)) ** (-1.0 / tail)
    values = np.where(b == len(bins) - 1, pareto, body)
    return np.maximum(np.rint(values), 1).astype(np.int64)


def length_histogram(lengths: NDArray, what: str = "history") -> str:
    """A text histogram over powers of two, with the mean and the percentiles that size a deployment."""
    if not len(lengths):
        return f"{what}: no requests"
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    lines = [
        f"{what} length over {len(lengths)} requests: mean {lengths.mean():.1f}, p50 {p50:.0f}, p90 {p90:.0f}, "
        f"p99 {p99:.0f}, max {lengths.max()}"
    ]
    counts = _power_of_two_counts(lengths)
    widest = max(counts.values())
    for name, count in counts.items():
        lines.append(f"  {name:>13} {count:7d} {'#' * round(40 * count / widest)}".rstrip())
    return "\n".join(lines)


def _power_of_two_counts(lengths: NDArray) -> Mapping[str, int]:
    bins = np.ceil(np.log2(lengths + 1)).astype(np.int64)
    names = ["0", "1", *(f"{1 << (b - 1)} to {(1 << b) - 1}" for b in range(2, int(bins.max()) + 1))]
    counts = np.bincount(bins, minlength=len(names))
    first = int(np.flatnonzero(counts)[0])
    return {names[b]: int(counts[b]) for b in range(first, int(bins.max()) + 1)}
