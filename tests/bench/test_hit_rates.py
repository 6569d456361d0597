"""Hit rates that are computed, held against simulations of small tables."""

from collections import OrderedDict

import numpy as np
import pytest

from hstu_trt.bench.tables.hit_rates import lru_rate, static_rate
from hstu_trt.bench.workloads.popularity import zipf_ranks

ROWS, LOOKUPS = 2_000, 60_000


def simulated(cached, exponent):
    """Shares of an LRU cache and of the most popular rows, the first third of the lookups not counted."""
    ranks = zipf_ranks(np.random.default_rng(7).random(LOOKUPS), rows=ROWS, exponent=exponent)
    cache, hits = OrderedDict(), 0
    for number, rank in enumerate(ranks.tolist()):
        if rank in cache:
            cache.move_to_end(rank)
            hits += number >= LOOKUPS // 3
        else:
            cache[rank] = None
            if len(cache) > cached:
                cache.popitem(last=False)
    return hits / (LOOKUPS - LOOKUPS // 3), float((ranks < cached).mean())


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05])
@pytest.mark.parametrize("cached", [1, 20, 200, 1000])
def test_computed_rates_are_those_of_a_simulation(cached, exponent):
    lru, static = simulated(cached, exponent)
    assert lru_rate(cached, ROWS, exponent) == pytest.approx(lru, abs=0.012)
    assert static_rate(cached, ROWS, exponent) == pytest.approx(static, abs=0.012)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.05])
def test_the_static_set_is_the_bound(exponent):
    for cached in (1, 10**5, 10**8, 10**9 - 1):
        lru, static = lru_rate(cached, 10**9, exponent), static_rate(cached, 10**9, exponent)
        assert 0 <= lru <= static + 1e-9 <= 1 + 2e-9
    assert lru_rate(0, 100, exponent) == 0.0
    assert lru_rate(100, 100, exponent) == lru_rate(101, 100, exponent) == 1.0


def test_uniform_rates_are_the_part_itself():
    for part in (0.01, 0.059, 0.5):
        assert static_rate(round(part * 10**9), 10**9, 0.0) == pytest.approx(part)
        assert lru_rate(round(part * 10**9), 10**9, 0.0) == pytest.approx(part, rel=1e-3)
