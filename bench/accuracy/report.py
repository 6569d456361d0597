"""The accuracy report: figures, gates and what went beyond them, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hstu_trt.bench.accuracy.fidelity import Figure
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract.text import text_table


@dataclass(frozen=True, kw_only=True)
class TensorFigure:
    """The largest difference of one output tensor from the reference's, as Polygraphy judged it."""

    variant: str
    tensor: str
    max_abs: float
    tolerance: float
    request: int
    passed: bool


@dataclass(frozen=True, kw_only=True)
class AccuracyReport:
    """All figures of a run."""

    reference: str
    """Name of the variant that the others are held against."""
    workload: Workload
    tensors: Sequence[TensorFigure]
    tasks: Mapping[tuple[str, str], Sequence[Figure]]
    """(variant, task) -> figures."""

    def failures(self) -> list[str]:
        """One sentence for each figure beyond its gate, with the request that it is worst in."""
        beyond = [
            f"{f.variant}, {f.tensor}: max |difference| {f.max_abs:.3g}, tolerance {f.tolerance:g}, "
            f"worst in {self.request_text(f.request)}"
            for f in self.tensors
            if not f.passed
        ]
        for (variant, task), figures in self.tasks.items():
            for figure in figures:
                if not figure.passed:
                    where = "" if figure.request is None else f", worst in {self.request_text(figure.request)}"
                    beyond.append(f"{variant}, task {task}: {_figure_text(figure)}{where}")
        return beyond

    def request_text(self, row: int) -> str:
        """Names a request so that it can be found again."""
        w = self.workload
        return (
            f"request {row} (slot {w.key[row, 0]}, number {w.key[row, 1]}, user {w.user_id[row]}, "
            f"{w.history_lengths[row]} events, {w.candidate_counts[row]} candidates)"
        )

    def text(self) -> str:
        """The tables for people."""
        candidates = len(self.workload.cand_item)
        tensors = [
            (f.variant, f.tensor, f"{f.max_abs:.2e}", f"{f.tolerance:g}", f.request, _verdict(f.passed))
            for f in self.tensors
        ]
        figures = [
            (variant, task, f.name, f"{f.value:.6g}", _gate_text(f), _verdict(f.passed) if f.gate is not None else "")
            for (variant, task), all_figures in self.tasks.items()
            for f in all_figures
        ]
        return "\n".join(
            [
                f"reference: {self.reference}; {len(self.workload)} requests, {candidates} candidates; "
                "labels drawn from the reference's scores",
                "",
                text_table(("runner", "output", "max |difference|", "tolerance", "worst request", ""), tensors),
                "",
                text_table(("runner", "task", "metric", "value", "gate", ""), figures),
            ]
        )

    def facts(self) -> dict[str, Any]:
        """The report as a JSON object; figures that are not defined are null."""
        return {
            "passed": not self.failures(),
            "failures": self.failures(),
            "reference": self.reference,
            "requests": len(self.workload),
            "candidates": len(self.workload.cand_item),
            "tensors": [{**vars(f), "max_abs": _finite(f.max_abs)} for f in self.tensors],
            "metrics": [
                {"variant": variant, "task": task, **vars(f), "value": _finite(f.value), "passed": f.passed}
                for (variant, task), figures in self.tasks.items()
                for f in figures
            ],
        }


def _figure_text(figure: Figure) -> str:
    return f"{figure.name} is {figure.value:.6g}, gate {_gate_text(figure)}"


def _gate_text(figure: Figure) -> str:
    if figure.gate is None:
        return ""
    return f"{'>=' if figure.at_least else '<='} {figure.gate:g}"


def _verdict(passed: bool) -> str:
    return "ok" if passed else "BEYOND"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
