"""The length laws against the figures of their sources."""

import numpy as np
import pytest

from hstu_trt.bench.workloads.lengths import (
    CLICK_BINS,
    CLICK_TAIL,
    EXPOSURE_BINS,
    EXPOSURE_TAIL,
    ConstLengths,
    QuantileLengths,
    StreamLengths,
    draw_lengths,
    length_histogram,
    sample_bins,
)
from hstu_trt.contract.errors import ConfigError

SAMPLES = 400_000
# law -> sampled mean, then percentile -> value, from a million draws of the same law.
MARGINALS = {
    "clicks": (CLICK_BINS, CLICK_TAIL, 28.96, {50: 7, 75: 25, 90: 69, 95: 122, 99: 293, 99.9: 1002}),
    "exposures": (EXPOSURE_BINS, EXPOSURE_TAIL, 285.4, {50: 33, 75: 185, 90: 685, 95: 1350, 99: 3414, 99.9: 12616}),
}


def uniform(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(SAMPLES)


@pytest.mark.parametrize("name", MARGINALS)
def test_marginals_have_the_published_mean_and_percentiles(name: str) -> None:
    bins, tail, mean, percentiles = MARGINALS[name]
    counts = sample_bins(bins, tail, uniform())
    assert counts.mean() == pytest.approx(mean, rel=0.03)
    for p, expected in percentiles.items():
        assert np.percentile(counts, p) == pytest.approx(expected, rel=0.06 if p > 99 else 0.03), p


@pytest.mark.parametrize("name", MARGINALS)
def test_every_bin_keeps_its_mean_and_bounds(name: str) -> None:
    bins, tail, *_ = MARGINALS[name]
    v = (np.arange(20_000) + 0.5) / 20_000
    for number, (smallest, mean, largest) in enumerate(bins):
        counts = sample_bins(bins, tail, (number + v) / len(bins))
        assert smallest <= counts.min() and counts.max() <= largest
        assert counts.mean() == pytest.approx(mean, rel=0.04)


def test_the_ends_of_the_unit_interval_are_legal() -> None:
    assert sample_bins(CLICK_BINS, CLICK_TAIL, np.array([0.0, 1.0])).tolist()[0] == 1
    assert sample_bins(EXPOSURE_BINS, EXPOSURE_TAIL, np.array([1.0]))[0] == pytest.approx(231_863, rel=1e-3)


def test_ecommerce_histories_have_the_published_shape() -> None:
    plan = draw_lengths(QuantileLengths(maximum=8192), np.random.default_rng(2), requests=200_000, users=1)
    p50, p90, p95, p99 = np.percentile(plan.length, [50, 90, 95, 99])
    assert plan.length.mean() == pytest.approx(290, rel=0.03)
    assert (p50, p90, p95, p99) == pytest.approx((48, 741, 1431, 3600), rel=0.05)
    assert plan.length.max() == 8192


def test_copula_ties_clicks_to_exposures() -> None:
    spread = [
        draw_lengths(
            QuantileLengths(maximum=10**6, copula_rho=rho), np.random.default_rng(3), requests=50_000, users=1
        ).length
        for rho in (-0.9, 0.9)
    ]
    assert np.std(np.log(spread[0])) < np.std(np.log(spread[1]))


@pytest.mark.parametrize("requests", [1, 5, 14, 256])
def test_forced_lengths_occur(requests: int) -> None:
    force = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256)
    law = QuantileLengths(scale=0.03125, maximum=256, force=force)
    lengths = draw_lengths(law, np.random.default_rng(4), requests=requests, users=1).length
    assert len(lengths) == requests
    assert set(force[:requests]) <= set(lengths.tolist())
    assert lengths.max() <= 256


def test_stream_histories_have_the_published_shape() -> None:
    plan = draw_lengths(StreamLengths(), np.random.default_rng(5), requests=10**6, users=3000)
    assert len(plan.length) == pytest.approx(3000 * 10 * 0.7, rel=0.02)
    assert plan.length.mean() == pytest.approx(6717, rel=0.01)
    assert plan.length.std() == pytest.approx(532, rel=0.06)
    means = [plan.length[plan.slot == slot].mean() for slot in (90, 99)]
    assert means == pytest.approx([6402, 7029], rel=0.01)


def test_stream_requests_are_ordered_by_slot_and_grow_per_user() -> None:
    plan = draw_lengths(StreamLengths(), np.random.default_rng(6), requests=10**6, users=50)
    assert (np.diff(plan.slot) >= 0).all()
    first = plan.stream[plan.slot == 90]
    assert (np.diff(first) < 0).any(), "not shuffled within a slot"
    for user in range(50):
        lengths = plan.length[plan.stream == user]
        assert (np.diff(lengths) >= 33).all()


def test_stream_requests_can_be_fewer() -> None:
    plan = draw_lengths(StreamLengths(), np.random.default_rng(6), requests=40, users=50)
    assert len(plan.length) == 40
    assert len(np.unique(plan.slot)) > 5


def test_const_lengths() -> None:
    assert draw_lengths(ConstLengths(value=7), np.random.default_rng(), requests=3, users=1).length.tolist() == [7] * 3


@pytest.mark.parametrize(("requests", "users"), [(0, 1), (1, 0)])
def test_nothing_to_draw_is_refused(requests: int, users: int) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        draw_lengths(ConstLengths(value=7), np.random.default_rng(), requests=requests, users=users)


def test_histogram_counts_every_length() -> None:
    text = length_histogram(np.array([0, 1, 2, 3, 4, 7, 8, 8]))
    counts = {line[:15].strip(): int(line[15:23]) for line in text.splitlines()[1:]}
    assert counts == {"0": 1, "1": 1, "2 to 3": 2, "4 to 7": 2, "8 to 15": 2}
    assert "8 requests" in text and "max 8" in text
    assert length_histogram(np.zeros(0, dtype=np.int64)) == "history: no requests"
