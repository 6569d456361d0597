"""Item popularity against the published coverage of the hottest rows."""

import numpy as np
import pytest

from hstu_trt.bench.workloads.popularity import draw_items, scatter_ranks, zipf_ranks
from hstu_trt.contract.errors import ConfigError

# rows, exponent -> share of the lookups that the hottest 0.1 %, 1 %, 4 % and 10 % of the rows take under the discrete
# law; the sampler integrates the power law instead, which costs the hottest rows up to 0.04 where rows are few.
COVERAGE = [
    (10**9, 0.0, (0.001, 0.010, 0.040, 0.100)),
    (10**9, 0.8, (0.24, 0.39, 0.52, 0.63)),
    (10**9, 1.05, (0.78, 0.86, 0.91, 0.94)),
    (8_000_000, 1.05, (0.68, 0.80, 0.86, 0.90)),
    (8_000_000, 1.2, (0.88, 0.94, 0.97, 0.98)),
    (20_000, 1.05, (0.40, 0.62, 0.75, 0.82)),
]


@pytest.mark.parametrize(("rows", "exponent", "shares"), COVERAGE)
def test_coverage(rows: int, exponent: float, shares: tuple[float, ...]) -> None:
    ranks = zipf_ranks(np.random.default_rng(7).random(200_000), rows=rows, exponent=exponent)
    for hottest, share in zip((0.001, 0.01, 0.04, 0.1), shares, strict=True):
        assert np.mean(ranks < hottest * rows) == pytest.approx(share, abs=0.045)


def test_shares_are_those_of_the_integrated_law() -> None:
    rows, exponent = 20_000, 1.05
    ranks = zipf_ranks(np.random.default_rng(8).random(400_000), rows=rows, exponent=exponent)
    edges = np.array([1.0, 2, 3, 21, 201, 2001, rows + 1]) ** (1 - exponent)
    shares = np.diff(edges) / (edges[-1] - 1)
    found = np.histogram(ranks + 1, bins=[1, 2, 3, 21, 201, 2001, rows + 1])[0] / len(ranks)
    assert found == pytest.approx(shares, abs=0.004)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05, 2.0])
@pytest.mark.parametrize("rows", [1, 2, 3, 400])
def test_every_row_is_reached_and_none_beyond(rows: int, exponent: float) -> None:
    ranks = zipf_ranks(np.linspace(0.0, np.nextafter(1.0, 0.0), 200_001), rows=rows, exponent=exponent)
    assert np.unique(ranks).tolist() == list(range(rows))
    assert (np.diff(ranks) >= 0).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 23, 64, 400, 1000, 20_000])
def test_scatter_is_a_bijection(rows: int) -> None:
    assert np.array_equal(np.sort(scatter_ranks(np.arange(rows), rows=rows)), np.arange(rows))


def test_scatter_parts_the_hot_rows() -> None:
    hot = np.sort(scatter_ranks(np.arange(20), rows=20_000))
    assert np.diff(hot).min() > 16


def test_unfit_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows >= 1"):
        draw_items(np.random.default_rng(), 1, rows=0, exponent=1.0)
