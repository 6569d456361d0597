"""Ranking metrics in float64: how well scores predict labels, and how alike two sets of scores rank.

Labels come from the teacher: Bernoulli draws of the reference's own scores, or these probabilities themselves, which
gives the metrics' expectations without the noise of the draw. The metrics then measure how faithful another runner is
to the reference; they say nothing about the quality of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_EPS = 1e-12


def teacher_labels(p_ref: NDArray, seed: int) -> NDArray:
    """Labels 0 or 1 [n] float64, drawn with the reference's probabilities."""
    return (np.random.default_rng(seed).random(p_ref.shape) < p_ref).astype(np.float64)


def normalised_entropy(p: NDArray, labels: NDArray) -> float:
    """NE: cross entropy of the scores over that of their constant mean label. NaN if the labels are all alike."""
    mean = float(np.mean(labels)) if labels.size else 0.0
    if mean in (0.0, 1.0):
        return float("nan")
    constant = _cross_entropy(np.full(labels.shape, mean), labels)
    return _cross_entropy(p.astype(np.float64), labels) / constant


def _cross_entropy(p: NDArray, labels: NDArray) -> float:
    """Mean cross entropy in bits, with p kept off 0 and 1 by 1e-12."""
    p = np.clip(p, _EPS, 1.0 - _EPS)
    return float(-np.mean(labels * np.log2(p) + (1.0 - labels) * np.log2(1.0 - p)))


def accuracy(p: NDArray, labels: NDArray) -> float:
    """Share of scores on the right side of 0.5 (0.5 counts as 1); expected, for labels that are probabilities."""
    return float(np.mean(np.where(p >= 0.5, labels, 1.0 - labels)))


def auc(scores: NDArray, labels: NDArray) -> float:
    """Chance that a positive outranks a negative, ties counting half. NaN without both, or if all scores are alike.

    For labels that are probabilities: over all pairs of different items, weighted with the chance to be such a pair.
    """
    positive = labels.astype(np.float64)
    negative = 1.0 - positive
    pairs = positive.sum() * negative.sum() - positive @ negative
    if not pairs > 0 or np.all(scores == scores[0]):
        return float("nan")
    _, group = np.unique(scores, return_inverse=True)
    in_group = np.bincount(group, weights=negative)
    below = np.cumsum(in_group) - in_group
    outranked = positive @ (below[group] + 0.5 * (in_group[group] - negative))
    return float(outranked / pairs)


def gauc(scores: NDArray, labels: NDArray, offsets: NDArray) -> float:
    """Mean AUC over requests, without those whose AUC is not defined; NaN if none is."""
    values = per_request(auc, offsets, scores, labels)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def top_k_overlap(scores: NDArray, reference: NDArray, k: int) -> float:
    """Share of the reference's k best that are among the k best here; equal scores rank by position."""
    k = min(k, scores.size)
    best, expected = (set(np.argsort(-s.astype(np.float64), kind="stable")[:k]) for s in (scores, reference))
    return len(best & expected) / k if k else float("nan")


def kendall_tau(scores: NDArray, reference: NDArray) -> float:
    """Kendall's tau-b between two rankings; NaN for fewer than two scores or a constant side."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, reference).statistic) if scores.size > 1 else float("nan")


def logit_difference(p: NDArray, p_ref: NDArray) -> NDArray:
    """|difference of the logits| per score, less what one float32 rounding of each probability explains.

    Scores leave a model as float32 probabilities; near 1 their spacing alone moves the logit by more than a gate.
    NaN where a score is NaN.
    """
    low, high = _logit_interval(p)
    ref_low, ref_high = _logit_interval(p_ref)
    return np.maximum(0.0, np.maximum(low - ref_high, ref_low - high))


def _logit_interval(p: NDArray) -> tuple[NDArray, NDArray]:
    p32 = p.astype(np.float32)
    step = np.spacing(p32).astype(np.float64)
    exact = p32.astype(np.float64)
    with np.errstate(divide="ignore"):
        low, high = np.clip(exact - step, 0.0, 1.0), np.clip(exact + step, 0.0, 1.0)
        return np.log(low) - np.log1p(-low), np.log(high) - np.log1p(-high)


def per_request(metric: Callable[..., float], offsets: NDArray, *arrays: NDArray) -> NDArray:
    """A metric of each request: ``arrays`` cut at ``offsets`` [requests + 1] -> float64 [requests]."""
    spans = itertools.pairwise(offsets)
    return np.array([metric(*(array[a:b] for array in arrays)) for a, b in spans], dtype=np.float64)
