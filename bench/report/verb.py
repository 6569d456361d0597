"""``hstu-trt bench report``: every result as one HTML file that loads nothing.

Reads the rows of bench/results/ (or --results). A load row without checks of its scores is refused: a fast wrong number
is no result. Of each served model the newest run counts; the comparison holds it against the run before, or against
--against.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hstu_trt.bench import compare
from hstu_trt.bench.load.rows import SUITE, TABLE_HEADER, score_verdict, table_cells
from hstu_trt.bench.report import plots as report_plots
from hstu_trt.bench.report.cases import SCENARIO_ORDER, Case, cases_of
from hstu_trt.bench.report.html_page import document, section, table
from hstu_trt.bench.result_rows import RESULTS, ResultRow, git_commit, latest, read_rows
from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import write_text_atomically

_STEP_HEADER = ("run", "step", "mean batch", "queue ms", "compute ms", "executions")
_KERNEL_HEADER = ("case", "variant", "us", "spread", "TFLOP/s", "relative L2", "times eager")
_OTHER_HEADER = ("case", "variant", "ms", "spread", "per s", "times better than", "checks", "device")


def page(rows: Sequence[ResultRow], against: Sequence[ResultRow] | None = None) -> str:
    """The HTML. Raises GateError for load rows without checks, ArtefactError if there is nothing to report."""
    if not rows:
        raise ArtefactError("there are no rows to report: `make perf` or hstu-trt bench serve measures some")
    cases = cases_of(rows)
    missed = [row for case in cases for row in case.rows if row.checks["gates_failed"]]
    state, word = (
        ("bad", f"{len(missed)} runs miss an accuracy gate") if missed else ("good", "every score kept its gates")
    )
    parts = [
        "<h1>hstu-trt: measured</h1>",
        f'<p class="soft">{escape(_sources(rows))}; page made at commit {escape(git_commit())}</p>',
        f'<p class="verdict {state}">{escape(word)}</p>' if cases else "",
        '<p class="soft">Workloads imitate MLPerf\'s DLRMv3 in shape. Nothing here is an MLPerf result.</p>',
        *_glance(cases),
        *(part for case in cases for part in _case_parts(case, against)),
        *_kernel_parts(rows),
        *_other_parts(rows),
    ]
    return document("hstu-trt: measured", parts)


def _glance(cases: Sequence[Case]) -> list[str]:
    """A line per served model: what it does offline, at the bound and alone."""
    lines = []
    for case in cases:
        for served in dict.fromkeys(row.details["served"] for row in case.rows):
            one = {
                scenario: [row for row in case.of(scenario) if row.details["served"] == served]
                for scenario in SCENARIO_ORDER
            }
            single = one["single"][0].details["run"]["latency_ms"] if one["single"] else {}
            server = one["server"][0] if one["server"] else None
            lines.append(
                (
                    served,
                    f"{one['offline'][0].per_s:.1f}" if one["offline"] else "",
                    _server_text(server.details["found"]) if server else "",
                    *(f"{single[p]:.2f}" if p in single else "" for p in ("p50", "p99")),
                    score_verdict(next(row for row in case.rows if row.details["served"] == served)),
                    case.name,
                )
            )  # fmt: skip
    header = ("served", "offline req/s", "server req/s", "alone p50 ms", "p99 ms", "scores", "case")
    return [section("At a glance", header, lines)] if lines else []


def _server_text(found: dict[str, Any]) -> str:
    return f"{found['rate']:.1f} ({found['bound']}{'' if found['kept'] else ': MISSED'})"


def _sources(rows: Sequence[ResultRow]) -> str:
    devices = sorted({row.device for row in rows})
    return f"{len(rows)} rows from {', '.join(devices)}, until {max(row.date for row in rows)[:10]}"


def _case_parts(case: Case, against: Sequence[ResultRow] | None) -> list[str]:
    first = case.rows[0]
    bound = next((row.details["found"]["bound"] for row in case.rows if row.details["found"]), None)
    return [
        f"<h2>{escape(case.name)}</h2>",
        f'<p class="soft">{escape(first.device)}, {first.date[:10]}, commit {escape(first.commit)}</p>',
        f'<div class="pictures">{"".join(case_pictures(case))}</div>',
        section(
            "Runs", TABLE_HEADER, [table_cells(row) for row in case.rows],
            f"open loop: latency counts from when a request was due. {f'server: {bound}' if bound else ''}",
        ),
        section("Accuracy of the same served models", *_accuracy(case), "against PyTorch fp32 on the same weights"),
        _folded("Steps of every run, per request", table(_STEP_HEADER, _steps(case))),
        *_baseline_part(case),
        *_perf_part(case),
        *_comparison_part(case, against),
        *_manifests(case),
    ]  # fmt: skip


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def case_pictures(case: Case) -> list[str]:
    """The SVGs of a case, those that its rows suffice for."""
    pictures = []
    served = dict.fromkeys(row.details["served"] for row in case.of("open"))
    curves = {name: [row for row in case.of("open") if row.details["served"] == name] for name in served}
    curves = {name: runs for name, runs in curves.items() if len(runs) > 1}
    bounds = [row.details["found"]["bound"] for row in case.rows if row.details["found"]]
    if curves:
        bound = float(bounds[0].split("<=")[1].split()[0]) if bounds else None
        pictures.append(report_plots.curve(curves, bound))
    shown = [row for row in (*case.of("single"), *case.of("server"), *case.of("offline")) if row.details["steps"]]
    if shown:
        pictures.append(report_plots.breakdown(shown))
    batching = [row for row in (*case.of("server"), *case.of("offline")) if _batches(row)]
    if batching:
        pictures.append(report_plots.batches(batching[0]))
    baselines = _baselines(case)
    if baselines:
        rows = [row for row in case.of("offline") if baselines[-1] in row.ratio_to]
        pictures.append(report_plots.ratio_bars(rows, baselines[-1]))
    return pictures


def _batches(row: ResultRow) -> bool:
    step = row.details["steps"].get(row.details["served"])
    return bool(step and len(step["batches"]) > 1)


def _baselines(case: Case) -> list[str]:
    return sorted({name for row in case.of("offline") for name in row.ratio_to if not name.endswith(" p99")})


def _accuracy(case: Case) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    newest = {row.details["served"]: row for row in case.rows}
    names = list(dict.fromkeys(name for row in newest.values() for name in row.checks))
    names = [name for name in names if name not in ("gates", "gates_failed")]
    rows = [
        (served, score_verdict(row), *(f"{row.checks[name]:.3g}" if name in row.checks else "" for name in names))
        for served, row in newest.items()
    ]
    return ("served", "verdict", *names), rows


def _steps(case: Case) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for row in case.rows:
        for name, step in row.details["steps"].items():
            ms = step["ms"]
            compute = sum(ms[f"compute_{part}"] for part in ("input", "infer", "output"))
            batch = "" if step["mean_batch"] is None else f"{step['mean_batch']:.2f}"
            lines.append((row.variant, name, batch, f"{ms['queue']:.2f}", f"{compute:.2f}", str(step["executions"])))
    return lines


def _baseline_part(case: Case) -> list[str]:
    rows = [row for row in case.rows if row.ratio_to]
    if not rows:
        return []
    lines = [(row.variant, name, f"{ratio:.2f}") for row in rows for name, ratio in row.ratio_to.items()]
    return [
        section("Beside PyTorch eager in a Triton Python backend, same run", ("run", "against", "times better"), lines)
    ]


def _perf_part(case: Case) -> list[str]:
    rows = [row for row in case.rows if row.details.get("to_ours")]
    if not rows:
        return []
    header = ("run", *(f"{name} / ours" for name in rows[0].details["to_ours"]), "flags")
    lines = [
        (
            row.variant,
            *(f"{r:.2f}" for r in row.details["to_ours"].values()),
            ", ".join(row.details["flags"]) or "valid",
        )
        for row in rows
    ]
    return [section("perf_analyzer and our client, in turn in one run", header, lines)]


def _comparison_part(case: Case, against: Sequence[ResultRow] | None) -> list[str]:
    before = [row for row in against if row.case == case.name] if against is not None else list(case.earlier)
    names = {row.variant for row in case.rows}
    if not any(row.variant in names for row in before):
        return [f'<h2>Earlier runs</h2><p class="soft">{"none of this case"}</p>']
    verdict = compare.compare_rows(before, case.rows)
    word = (
        "no regression" if verdict.passed else f"{len(verdict.worse)} figures WORSE, {len(verdict.problems)} problems"
    )
    lines = [compare.cells(change)[1:] for change in verdict.changes]
    return [section("Against the run before", compare.HEADER[1:], lines, word)]


def _manifests(case: Case) -> list[str]:
    first = case.rows[0]
    facts = {
        "workload": first.details["workload"],
        "deployment": first.details["deployment"],
        "environment": first.details["environment"],
        "machine during the runs": {row.variant: row.details["machine"] for row in case.rows if row.details["machine"]},
        "versions": first.versions,
    }
    return [_folded(name, table(("", ""), _flat(value))) for name, value in facts.items()]


def _flat(value: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, item if isinstance(item, str) else json.dumps(item)) for name, item in value.items()]


def _kernel_parts(rows: Sequence[ResultRow]) -> list[str]:
    kernels = [row for row in latest(row for row in rows if row.suite == "kernels").values() if row.checks]
    picture = report_plots.roofline(rows)
    if not kernels:
        return []
    lines = [
        (
            row.case, row.variant, f"{row.median_us:.1f}", f"{row.spread:.1%}", f"{row.tflops or 0:.0f}",
            f"{row.checks.get('relative_l2', float('nan')):.1e}",
            next((f"{ratio:.2f}" for name, ratio in row.ratio_to.items() if "eager" in name), ""),
        )
        for row in kernels
    ]  # fmt: skip
    title = f"Attention kernels, {kernels[0].device}"
    shown = f'<div class="pictures">{picture}</div>' if picture else ""
    return [
        f"<h2>{escape(title)}</h2>{shown}<details><summary>every row</summary>{table(_KERNEL_HEADER, lines)}</details>"
    ]


def _other_parts(rows: Sequence[ResultRow]) -> list[str]:
    """Every other suite as a table: lookups of the tables, plugins, engines."""
    parts = []
    for suite in sorted({row.suite for row in rows} - {SUITE, "kernels"}):
        newest = latest(row for row in rows if row.suite == suite).values()
        lines = [
            (
                row.case, row.variant, f"{row.median_us / 1e3:.3g}", f"{row.spread:.0%}",
                "" if row.per_s is None else f"{row.per_s:,.0f}",
                ", ".join(f"{name}: {value:.2f}" for name, value in row.ratio_to.items()),
                ", ".join(f"{name} {value:.3g}" for name, value in row.checks.items()), row.device,
            )
            for row in newest
        ]  # fmt: skip
        parts.append(_folded(f"Suite {suite}: {len(lines)} rows", table(_OTHER_HEADER, lines)))
    return ["<h2>Other suites</h2>", *parts] if parts else []


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser(prog="hstu-trt bench report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, nargs="+", help="files of rows (default: all in bench/results/)")
    parser.add_argument(
        "--against", help="file, folder or commit to compare with (default: earlier rows of the same files)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/report/report.html"), help="(default: %(default)s)")
    parser.add_argument(
        "--pictures", type=Path, help="also write serving_curve.svg and serving_steps.svg to this folder"
    )
    args = parser.parse_args(argv)
    rows = read_rows(args.results or sorted(RESULTS.glob("*.jsonl")))
    write_text_atomically(args.out, page(rows, compare.read_side(args.against) if args.against else None))
    print(f"wrote {args.out}: {len(rows)} rows, {args.out.stat().st_size / 1024:.0f} KiB")
    if args.pictures is not None:
        cases = [case for case in cases_of(rows) if len(case.of("open")) > 1]
        if not cases:
            raise ArtefactError(
                "no case has a curve to draw: hstu-trt bench serve --scenarios single,offline,server,open"
            )
        for name, picture in zip(("serving_curve", "serving_steps"), case_pictures(cases[-1]), strict=False):
            write_text_atomically(args.pictures / f"{name}.svg", picture)
            print(f"wrote {args.pictures / f'{name}.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt bench report"))
