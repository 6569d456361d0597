"""How often a part of a table answers: a static set of its most popular rows, and an LRU cache of the same size.

For lookups that are independent of each other, as the workloads here draw them, no cache of a fixed size answers more
often than the static set. LRU is computed, not simulated: the approximation of Che, Tung and Wang (IEEE JSAC 2002)
holds within a percentage point already for small tables (``tests/bench/test_hit_rates.py`` simulates them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.tables.popularity import zipf_share

ROWS = 1_000_000_000
"""Of DLRMv3's item table."""
SHARES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
"""Parts of a table that are shown."""
_BINS = 4000


@dataclass(frozen=True)
class Law:
    """How popular rows are: P(rank r) ~ r ** -exponent."""

    name: str
    exponent: float


LAWS = (Law("uniform (DLRMv3)", 0.0), Law("Zipf 0.8", 0.8), Law("Zipf 1.05", 1.05))


def static_rate(cached: int, rows: int, exponent: float) -> float:
    """Share of lookups that the ``cached`` most popular of ``rows`` rows answer."""
    return zipf_share(cached, rows, exponent)


def lru_rate(cached: int, rows: int, exponent: float) -> float:
    """Share of lookups that an LRU cache of ``cached`` rows answers, once it is full.

    A row is in the cache if it was asked for within the last T lookups; T is such that ``cached`` rows are expected.
    """
    if cached <= 0 or cached >= rows:
        return float(cached >= rows)
    counts, shares = _bins(rows, exponent)
    each = shares / counts
    low, high = 0.0, 1.0
    while _expected(high, counts, each) < cached:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _expected(middle, counts, each) < cached else (low, middle)
    return float((shares * -np.expm1(-each * high)).sum())


def _expected(lookups: float, counts: NDArray, each: NDArray) -> float:
    """Rows that are expected among so many lookups."""
    return float((counts * -np.expm1(-each * lookups)).sum())


def _bins(rows: int, exponent: float) -> tuple[NDArray, NDArray]:
    """Runs of ranks: how many rows each has, and its share of the lookups."""
    edges = np.unique(np.concatenate([[0], np.geomspace(1, rows, _BINS).round().astype(np.int64), [rows]]))
    below = np.asarray([zipf_share(int(edge), rows, exponent) for edge in edges])
    return np.diff(edges).astype(np.float64), np.diff(below)
