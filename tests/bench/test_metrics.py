"""Ranking metrics against values worked out by hand, and brute force."""

import itertools
import math

import numpy as np
import pytest

from hstu_trt.bench.accuracy import metrics


def brute_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def brute_tau(a: np.ndarray, b: np.ndarray) -> float:
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in itertools.combinations(range(len(a)), 2)]
    untied = [math.sqrt(sum(s[side] != 0 for s in signs)) for side in (0, 1)]
    return sum(x * y for x, y in signs) / (untied[0] * untied[1])


def test_entropy_by_hand() -> None:
    p, labels = np.array([0.5, 0.25]), np.array([1.0, 0.0])
    assert metrics.normalised_entropy(p, labels) == pytest.approx((1.0 + math.log2(4 / 3)) / 2)


def test_entropy_of_the_mean_label_is_one() -> None:
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    assert metrics.normalised_entropy(np.full(4, 0.25), labels) == pytest.approx(1.0)


def test_entropy_keeps_off_zero_and_one() -> None:
    value = metrics.normalised_entropy(np.array([0.0, 0.5]), np.array([1.0, 0.0]))
    assert value == pytest.approx((-math.log2(1e-12) + 1.0) / 2)


@pytest.mark.parametrize("labels", [[], [1.0, 1.0], [0.0]])
def test_entropy_is_undefined_for_labels_all_alike(labels: list[float]) -> None:
    assert math.isnan(metrics.normalised_entropy(np.full(len(labels), 0.5), np.array(labels)))


def test_accuracy_by_hand() -> None:
    assert metrics.accuracy(np.array([0.5, 0.49, 0.9, 0.1]), np.array([1.0, 1.0, 0.0, 0.0])) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_auc_with_ties_is_the_share_of_won_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, 40) / 4, rng.integers(0, 2, 40)
    assert metrics.auc(scores, labels) == pytest.approx(brute_auc(scores, labels))


def test_gauc_skips_undefined_requests() -> None:
    scores = np.array([0.1, 0.9, 0.9, 0.1, 0.3, 0.4, 0.5, 0.5])
    labels = np.array([0, 1, 0, 1, 1, 1, 0, 1])
    offsets = np.array([0, 2, 4, 6, 6, 8])
    assert metrics.gauc(scores, labels, offsets) == 0.5
    assert math.isnan(metrics.gauc(scores, np.ones(8), offsets))


def test_top_k_overlap() -> None:
    reference = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert metrics.top_k_overlap(reference, reference, 3) == 1.0
    assert metrics.top_k_overlap(-reference, reference, 3) == pytest.approx(1 / 3)
    assert metrics.top_k_overlap(-reference, reference, 10) == 1.0
    assert metrics.top_k_overlap(np.zeros(5), np.zeros(5), 2) == 1.0
    assert math.isnan(metrics.top_k_overlap(np.zeros(0), np.zeros(0), 2))


@pytest.mark.parametrize("seed", range(3))
def test_kendall_tau_with_ties(seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 15)).astype(float)
    assert metrics.kendall_tau(a, b) == pytest.approx(brute_tau(a, b))


def test_kendall_tau_is_undefined_for_one_score_or_a_constant() -> None:
    assert math.isnan(metrics.kendall_tau(np.array([1.0]), np.array([1.0])))
    assert math.isnan(metrics.kendall_tau(np.ones(3), np.arange(3)))


def test_logit_difference_of_ordinary_scores() -> None:
    logits = np.linspace(-8, 3, 50)
    p, q = (1 / (1 + np.exp(-x)) for x in (logits, logits + 0.01))
    assert metrics.logit_difference(q.astype(np.float32), p.astype(np.float32)) == pytest.approx(
        np.full(50, 0.01), abs=1e-5
    )


def test_logit_difference_forgives_one_rounding_only() -> None:
    top = np.float32(1.0) - np.spacing(np.float32(0.99)) * np.arange(9, dtype=np.float32)
    assert metrics.logit_difference(top[:2], top[1:3]).tolist() == [0.0, 0.0]
    assert metrics.logit_difference(top[8:], top[:1])[0] > 0
    assert metrics.logit_difference(np.array([0.0]), np.array([0.0]))[0] == 0.0
    assert metrics.logit_difference(np.array([0.0]), np.array([1.0]))[0] > 10


def test_logit_difference_of_nan_is_nan() -> None:
    assert math.isnan(metrics.logit_difference(np.array([np.nan]), np.array([0.5]))[0])


def test_teacher_labels_follow_the_scores_and_the_seed() -> None:
    p = np.repeat([0.0, 0.2, 1.0], 5000)
    labels = metrics.teacher_labels(p, seed=3)
    assert np.array_equal(labels, metrics.teacher_labels(p, seed=3))
    assert not np.array_equal(labels, metrics.teacher_labels(p, seed=4))
    assert labels.reshape(3, -1).mean(axis=1) == pytest.approx([0.0, 0.2, 1.0], abs=0.02)
