"""What a comparison of two runners found: figures, gates and what went beyond them, as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy import metrics
from hstu_trt.bench.accuracy.fidelity import TOP_K, Figure
from hstu_trt.bench.diff.divergence import Bucket, OutputErrors, buckets, first_beyond, growth
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.text import text_table

_GROWTH_WORTH_A_WORD = 3.0
BUCKET_HEADER = ("history", "requests", "candidates", "max |diff|", "rel. L2", "tau", f"top {TOP_K}", "")
OUTPUT_HEADER = ("output", "max |diff|", "tolerance", "rel. L2", "worst request", "")
METRIC_HEADER = ("task", "metric", "value", "gate", "")


@dataclass(frozen=True, kw_only=True)
class DiffReport:
    """All figures of a comparison."""

    a: str
    """The reference."""
    b: str
    facts: Mapping[str, Any]
    """What was compared: model, sides, attention norm, versions."""
    requests: Requests
    edges: Sequence[int]
    """Lower ends of the buckets of history length."""
    outputs: Sequence[OutputErrors]
    """In the order of the graph."""
    preds_a: NDArray
    """Scores float32 [candidates, tasks]."""
    preds_b: NDArray
    tasks: Mapping[str, Sequence[Figure]]
    """Task -> ranking figures."""

    @property
    def passed(self) -> bool:
        return not self.failures()

    def output(self, name: str) -> OutputErrors:
        """The errors of one output."""
        return next(output for output in self.outputs if output.name == name)

    def buckets(self) -> list[Bucket]:
        """The requests by length of history."""
        return buckets(self.requests.history_lengths, self.edges)

    def failures(self) -> list[str]:
        """One sentence for each figure beyond its gate, with the request that it is worst in."""
        beyond = [f"{self._output_text(o)}, worst in {self.requests.text(o.worst_request)}" for o in self._beyond()]
        for task, figures in self.tasks.items():
            for figure in figures:
                if not figure.passed:
                    where = "" if figure.request is None else f", worst in {self.requests.text(figure.request)}"
                    beyond.append(f"task {task}: {figure.name} is {figure.value:.6g}, gate {gate_text(figure)}{where}")
        return beyond

    def _beyond(self) -> list[OutputErrors]:
        return [output for output in self.outputs if not output.passed]

    @staticmethod
    def _output_text(output: OutputErrors) -> str:
        total = output.total
        if total.mismatches:
            return f"{output.name}: {total.mismatches} elements are NaN or Inf on one side only"
        return f"{output.name}: max |difference| {total.max_abs:.3g}, tolerance {output.tolerance:g}"

    def divergence(self) -> str:
        """Which layer parts first, in a sentence; and where the error grows fastest."""
        first = first_beyond(self.outputs)
        if first is not None:
            return f"first beyond its tolerance: {self._output_text(first)}"
        steps = [(name, times) for name, times in growth(self.outputs) if times > _GROWTH_WORTH_A_WORD]
        if not steps:
            return "no output is beyond its tolerance"
        name, times = max(steps, key=lambda step: step[1])
        return f"no output is beyond its tolerance; the error grows most in {name}, by a factor of {times:.1f}"

    def head(self) -> list[str]:
        """What was compared, in two lines."""
        candidates, norm = int(self.requests.candidate_counts.sum()), self.facts["attention_norm"]
        return [
            f"A {self.a} (reference), B {self.b}: {self.facts['model']}",
            f"{len(self.requests)} requests, {candidates} candidates ({self.requests.source}), attention norm {norm}",
        ]

    def output_rows(self) -> list[tuple[Any, ...]]:
        """A row per output."""
        return [
            (
                output.name,
                f"{output.total.max_abs:.2e}",
                "" if output.tolerance is None else f"{output.tolerance:g}",
                f"{output.total.relative_l2:.1e}",
                output.worst_request,
                "not judged" if output.tolerance is None else verdict(output.passed),
            )
            for output in self.outputs
        ]

    def bucket_rows(self) -> list[tuple[Any, ...]]:
        """A row per bucket of history length, for the scores; ranking figures are means over requests and tasks."""
        preds = self.output("preds")
        tau, overlap = self._per_request_rankings()
        rows = []
        for bucket in self.buckets():
            seen = preds.errors.among(bucket.rows)
            within = not seen.mismatches and (preds.tolerance is None or seen.max_abs <= preds.tolerance)
            rows.append(
                (
                    bucket.label,
                    len(bucket.rows),
                    int(self.requests.candidate_counts[bucket.rows].sum()),
                    f"{seen.max_abs:.2e}",
                    f"{seen.relative_l2:.1e}",
                    *(_mean_text(values[bucket.rows]) for values in (tau, overlap)),
                    verdict(within),
                )
            )
        return rows

    def _per_request_rankings(self) -> tuple[NDArray, NDArray]:
        """Kendall's tau and the share of A's best that are B's best, per request, means over tasks."""
        offsets = self.requests.candidate_offsets
        sides = list(zip(self.preds_b.T, self.preds_a.T, strict=True))
        tau = [metrics.per_request(metrics.kendall_tau, offsets, b, a) for b, a in sides]
        best = [
            metrics.per_request(lambda p, reference: metrics.top_k_overlap(p, reference, TOP_K), offsets, b, a)
            for b, a in sides
        ]
        return np.mean(tau, axis=0), np.mean(best, axis=0)

    def metric_rows(self) -> list[tuple[str, ...]]:
        """A row per ranking figure of a task."""
        return [
            (task, f.name, f"{f.value:.6g}", gate_text(f), verdict(f.passed) if f.gate is not None else "")
            for task, figures in self.tasks.items()
            for f in figures
        ]

    def text(self) -> str:
        """The summary for people: one screen for a model of a few layers."""
        judged = [*(o.passed for o in self.outputs if o.tolerance is not None)]
        judged += [f.passed for figures in self.tasks.values() for f in figures if f.gate is not None]
        return "\n".join(
            [
                *self.head(),
                "",
                text_table(OUTPUT_HEADER, self.output_rows()),
                self.divergence(),
                "",
                text_table(BUCKET_HEADER, self.bucket_rows()),
                "",
                text_table(METRIC_HEADER, self.metric_rows()),
                f"{'PASSED' if self.passed else 'BEYOND A GATE'}: {sum(judged)} of {len(judged)} gates kept",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; figures that are not defined are null."""
        first = first_beyond(self.outputs)
        return {
            "passed": self.passed,
            "failures": self.failures(),
            **self.facts,
            "a": self.a,
            "b": self.b,
            "source": self.requests.source,
            "requests": len(self.requests),
            "candidates": int(self.requests.candidate_counts.sum()),
            "first_beyond": None if first is None else first.name,
            "outputs": [
                {
                    "name": o.name,
                    **dataclasses.asdict(o.total),
                    "tolerance": o.tolerance,
                    "worst_request": o.worst_request,
                    "passed": o.passed,
                }
                for o in self.outputs
            ],
            "buckets": [dict(zip((*BUCKET_HEADER[:-1], "verdict"), row, strict=True)) for row in self.bucket_rows()],
            "metrics": [
                {"task": task, **dataclasses.asdict(f), "value": _finite(f.value), "passed": f.passed}
                for task, figures in self.tasks.items()
                for f in figures
            ],
        }


def gate_text(figure: Figure) -> str:
    """As in ``<= 0.001``; empty without a gate."""
    return "" if figure.gate is None else f"{'>=' if figure.at_least else '<='} {figure.gate:g}"


def verdict(passed: bool) -> str:
    """For the last column of a table."""
    return "ok" if passed else "BEYOND"


def _mean_text(values: NDArray) -> str:
    defined = values[~np.isnan(values)]
    return f"{defined.mean():.4f}" if defined.size else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
