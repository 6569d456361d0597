"""The report of a comparison as one HTML file: no script, nothing loaded, legible on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from hstu_trt.bench.diff_plots import pictures
from hstu_trt.bench.diff_report import BUCKET_HEADER, METRIC_HEADER, OUTPUT_HEADER, DiffReport

_WORST = 5
_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --ink: #1f2937; --soft: #4b5563;
  --rule: #e5e7eb; --good: #0f766e; --bad: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ground: #05070a; --card: #0d1117; --ink: #e6edf3; --soft: #9da7b3;
  --rule: #21262d; --good: #3fc7b5; --bad: #fb9a5b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 ui-sans-serif, system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0.2rem 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 0.5rem; }
p { margin: 0.3rem 0; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.15rem; font-weight: 600; margin: 0.6rem 0; }
.pictures { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.pictures svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; background: var(--card); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.88rem; }
th, td { padding: 0.3rem 0.6rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
@media (max-width: 30rem) { table { font-size: 0.7rem; } th, td { padding: 0.25rem 0.2rem; } }
"""


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
        _section("Outputs, in the order of the graph", OUTPUT_HEADER, report.output_rows()),
        _section("Scores by length of history", BUCKET_HEADER, report.bucket_rows()),
        _section("Ranking", METRIC_HEADER, report.metric_rows()),
        _section("Worst requests", ("request", "events", "candidates", "max |diff|"), _worst_rows(report)),
        _section("What was compared", ("", ""), _fact_rows(report)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>"


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="scroll">{table}</div>'


def _cell(value: Any) -> str:
    text = str(value)
    style = {"ok": ' class="good"', "BEYOND": ' class="bad"'}.get(text, "")
    return f"<td{style}>{escape(text)}</td>"


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
