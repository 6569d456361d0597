"""Item popularity: which table rows a workload looks up.

P(rank r) is proportional to r to the power of -exponent over all rows (0 is uniform). A fixed bijection scatters the
ranks over the table, so that hot rows are not neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError

# Odd, so that multiplication by it is a bijection modulo any power of two.
_MULTIPLIER = 0x9E3779B97F4A7C15


def draw_items(rng: np.random.Generator, count: int, *, rows: int, exponent: float) -> NDArray:
    """Draws int64 row numbers [count] in [0, rows)."""
    if rows < 1 or exponent < 0:
        raise ConfigError(f"popularity needs rows >= 1 and an exponent >= 0, got {rows} and {exponent}")
    return scatter_ranks(zipf_ranks(rng.random(count), rows=rows, exponent=exponent), rows=rows)


def zipf_ranks(u: NDArray, *, rows: int, exponent: float) -> NDArray:
    """Bounded inverse CDF: uniform ``u`` in [0, 1) -> int64 ranks in [0, rows), 0 the most popular.

    The power law is integrated from 1 to ``rows + 1``, so that the last rank gets its share too.
    """
    end = float(rows + 1)
    if exponent == 1.0:
        position = end**u
    else:
        power = 1.0 - exponent
        position = (u * (end**power - 1.0) + 1.0) ** (1.0 / power)
    return np.clip(np.floor(position).astype(np.int64), 1, rows) - 1


def scatter_ranks(ranks: NDArray, *, rows: int) -> NDArray:
    """A fixed bijection of [0, rows): multiply modulo the next power of two, and again until the result is a row."""
    mask = np.uint64((1 << (rows - 1).bit_length()) - 1)
    items: NDArray = ranks.astype(np.uint64)
    outside = np.ones(len(items), dtype=bool)
    while outside.any():
        items[outside] = (items[outside] * np.uint64(_MULTIPLIER)) & mask
        outside = items >= rows
    return items.astype(np.int64)
