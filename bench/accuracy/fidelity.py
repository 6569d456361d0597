"""Ranking fidelity: what a runner's scores would change for the people who read the ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy import metrics
from hstu_trt.contract.gates import RankingGates
from hstu_trt.contract.model import TaskConfig
from hstu_trt.contract.tensors import Precision

TOP_K = 10


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured figure, its gate if it has one, and the request that it is worst in if it is one request's."""

    name: str
    value: float
    gate: float | None = None
    at_least: bool = False
    """Whether the gate is a lower bound."""
    request: int | None = None

    @property
    def passed(self) -> bool:
        """A figure that is NaN does not pass its gate."""
        if self.gate is None:
            return True
        return self.value >= self.gate if self.at_least else self.value <= self.gate


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one task by one runner and by the reference, float [candidates], with labels and requests."""

    p: NDArray
    reference: NDArray
    labels: NDArray
    offsets: NDArray
    """int64 [requests + 1]"""


def task_figures(scores: Scores, task: TaskConfig, precision: Precision, gates: RankingGates) -> list[Figure]:
    """The figures of one task. A regression task has no labels to be right about: only its ranking counts."""
    overlap = metrics.per_request(
        lambda p, ref: metrics.top_k_overlap(p, ref, TOP_K), scores.offsets, scores.p, scores.reference
    )
    tau = metrics.per_request(metrics.kendall_tau, scores.offsets, scores.p, scores.reference)
    ranking = [Figure(name=f"top_{TOP_K}_overlap", value=_mean(overlap)), Figure(name="kendall_tau", value=_mean(tau))]
    if task.kind == "regression":
        return ranking
    return [*_aggregates(scores, gates), *ranking, *_worst_requests(scores, precision, gates)]


def _aggregates(scores: Scores, gates: RankingGates) -> list[Figure]:
    entropy, entropy_ref = (metrics.normalised_entropy(p, scores.labels) for p in (scores.p, scores.reference))
    right, right_ref = (metrics.accuracy(p, scores.labels) for p in (scores.p, scores.reference))
    gauc, gauc_ref = (metrics.gauc(p, scores.labels, scores.offsets) for p in (scores.p, scores.reference))
    return [
        Figure(name="entropy", value=entropy),
        Figure(name="entropy_change", value=abs(entropy / entropy_ref - 1.0), gate=gates.entropy_change),
        Figure(name="accuracy", value=right),
        Figure(name="accuracy_ratio", value=_ratio(right, right_ref), gate=gates.accuracy_ratio, at_least=True),
        Figure(name="gauc", value=gauc),
        Figure(name="gauc_ratio", value=_ratio(gauc, gauc_ref), gate=gates.gauc_ratio, at_least=True),
    ]


def _worst_requests(scores: Scores, precision: Precision, gates: RankingGates) -> list[Figure]:
    """Per-request gates: the entropy where a request has candidates enough, else the logits."""
    long = np.diff(scores.offsets) >= gates.request_entropy_candidates
    difference = metrics.logit_difference(scores.p, scores.reference)
    logits = metrics.per_request(lambda d: d.max(initial=0.0), scores.offsets, difference)
    figures = []
    if not long.all():
        figures.append(_worst("request_max_logit", logits, ~long, gates.max_logit[precision]))
    if long.any():
        entropy, reference = (
            metrics.per_request(metrics.normalised_entropy, scores.offsets, p, scores.labels)
            for p in (scores.p, scores.reference)
        )
        defined = long & ~np.isnan(reference)
        if defined.any():
            change = np.abs(entropy / reference - 1.0)
            figures.append(_worst("request_entropy_change", change, defined, gates.request_entropy))
    return figures


def _worst(name: str, values: NDArray, where: NDArray, gate: float) -> Figure:
    """The largest value (a NaN counts as largest) among the requests ``where``, and its request."""
    rows = np.flatnonzero(where)
    row = int(rows[np.argmax(np.where(np.isnan(values[rows]), np.inf, values[rows]))])
    return Figure(name=name, value=float(values[row]), gate=gate, request=row)


def _mean(values: NDArray) -> float:
    """The mean without undefined requests."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _ratio(value: float, reference: float) -> float:
    """value / reference; 1 if both are undefined or zero, since then nothing changed."""
    if value == reference or (np.isnan(value) and np.isnan(reference)):
        return 1.0
    return value / reference if reference else float("nan")
