"""The report of a comparison as one HTML file: no script, nothing loaded, legible on a phone and in the dark."""

from __future__ import annotations

from html import escape
from typing import Any

from hstu_trt.bench.diff.plots import pictures
from hstu_trt.bench.diff.report import BUCKET_HEADER, METRIC_HEADER, OUTPUT_HEADER, DiffReport
from hstu_trt.bench.report.html_page import document, section

_WORST = 5


def page(report: DiffReport) -> str:
    """The HTML."""
    title = f"{report.b} against {report.a}"
    state, word = ("good", "Passed") if report.passed else ("bad", "Beyond a gate")
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in report.head()),
        f'<p class="verdict {state}">{word}: {escape(report.divergence())}</p>',
        *(f'<p class="bad">{escape(failure)}</p>' for failure in report.failures()),
        f'<div class="pictures">{"".join(pictures(report))}</div>',
        section("Outputs, in the order of the graph", OUTPUT_HEADER, report.output_rows()),
        section("Scores by length of history", BUCKET_HEADER, report.bucket_rows()),
        section("Ranking", METRIC_HEADER, report.metric_rows()),
        section("Worst requests", ("request", "events", "candidates", "max |diff|"), _worst_rows(report)),
        section("What was compared", ("", ""), _fact_rows(report)),
    ]
    return document(title, parts)


def _worst_rows(report: DiffReport) -> list[tuple[Any, ...]]:
    """The requests whose scores differ most."""
    errors, requests = report.output("preds").errors.max_abs, report.requests
    rows = sorted(range(len(requests)), key=lambda row: -errors[row])[:_WORST]
    return [(row, requests.history_lengths[row], requests.candidate_counts[row], f"{errors[row]:.2e}") for row in rows]


def _fact_rows(report: DiffReport) -> list[tuple[str, str]]:
    facts = report.facts
    rows = [
        (f"{side.upper()}: {key}", str(value)) for side, known in facts["sides"].items() for key, value in known.items()
    ]
    rows.append(("labels", f"drawn from A's scores, seed {facts['label_seed']}"))
    return [*rows, *((f"{name} version", version) for name, version in facts["versions"].items())]
