"""The report's page: every result as HTML, each part with where, when and at which commit it was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from hstu_trt.bench import compare
from hstu_trt.bench.load.rows import SUITE, TABLE_HEADER, own_steps, score_verdict, sees_queues, table_cells
from hstu_trt.bench.report import plots as report_plots
from hstu_trt.bench.report.cases import SCENARIO_ORDER, Case, cases_of
from hstu_trt.bench.report.html_page import document, section, table
from hstu_trt.bench.result_rows import ResultRow, git_commit, latest, sources
from hstu_trt.contract.errors import ArtefactError

_GLANCE_HEADER = ("served", "offline req/s", "server, asked/s", "alone p50 ms", "alone p99 ms", "scores")
_STEP_HEADER = ("run", "step", "mean batch", "queue ms", "compute ms", "executions", "counted by")
_KERNEL_HEADER = ("case", "variant", "median us", "spread", "TFLOP/s", "relative L2", "times eager")
_OTHER_HEADER = ("case", "variant", "median ms", "spread", "per s", "times as fast as", "checks", "measured")


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
    """A table per case: what each served model does offline, at the bound and alone."""
    parts = ["<h2>At a glance</h2>"] if cases else []
    for case in cases:
        lines = []
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
                )
            )
        parts += [f"<p>{escape(case.name)}</p>{_measured(case.rows)}", table(_GLANCE_HEADER, lines)]
    return parts


def _measured(rows: Sequence[ResultRow]) -> str:
    """Where, when and at which commits, small."""
    text = "; ".join(f"{device}, {day}, commit {commit[:12]}" for device, day, commit in sources(rows))
    return f'<p class="soft">{escape(text)}</p>'


def _server_text(found: dict[str, Any]) -> str:
    return f"{found['rate']:.1f} ({found['bound']}{'' if found['kept'] else ': MISSED'})"


def _sources(rows: Sequence[ResultRow]) -> str:
    devices = sorted({row.device for row in rows})
    return f"{len(rows)} rows from: {'; '.join(devices)}; until {max(row.date for row in rows)[:10]}"


def _case_parts(case: Case, against: Sequence[ResultRow] | None) -> list[str]:
    bound = next((row.details["found"]["bound"] for row in case.rows if row.details["found"]), None)
    return [
        f"<h2>{escape(case.name)}</h2>",
        _measured(case.rows),
        f'<div class="pictures">{"".join(case_pictures(case))}</div>',
        section(
            "Runs", TABLE_HEADER, [table_cells(row) for row in case.rows],
            "req/s is the median of the repeats, latencies are those of the repeat with the middle p99. "
            f"Open loop: they count from when a request was due. {f'server: {bound}' if bound else ''}",
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
    shown = [row for row in (*case.of("single"), *case.of("server"), *case.of("offline")) if sees_queues(row)]
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
    step = own_steps(row).get(row.details["served"])
    return bool(step and sees_queues(row) and len(step["batches"]) > 1)


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
        counted = "" if sees_queues(row) else "Triton, until our model took the request"
        for name, step in own_steps(row).items():
            ms = step["ms"]
            compute = sum(ms[f"compute_{part}"] for part in ("input", "infer", "output"))
            batch = "" if step["mean_batch"] is None else f"{step['mean_batch']:.2f}"
            executions = str(step["executions"])
            lines.append((row.variant, name, batch, f"{ms['queue']:.2f}", f"{compute:.2f}", executions, counted))
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
    before = [row for row in before if row.variant in names]
    if not before:
        return []
    verdict = compare.compare_rows(before, case.rows)
    word = (
        "no regression" if verdict.passed else f"{len(verdict.worse)} figures WORSE, {len(verdict.problems)} problems"
    )
    if verdict.devices:
        word += f"; A and B ran on different devices, which decides nothing: {' and '.join(verdict.devices)}"
    lines = [compare.cells(change)[1:] for change in verdict.changes]
    return [
        section("Against the run before", compare.HEADER[1:], lines, word),
        *(f'<p class="bad">{escape(problem)}</p>' for problem in verdict.problems),
        f'<p class="soft">A:</p>{_measured(before)}',
    ]


def _manifests(case: Case) -> list[str]:
    newest = max(case.rows, key=lambda row: row.date)
    facts = {
        "workload of the newest run": newest.details["workload"],
        "deployment of the newest run": newest.details["deployment"],
        "environment of the newest run": newest.details["environment"],
        "versions of the newest run": newest.versions,
        "machine during the runs": {row.variant: row.details["machine"] for row in case.rows if row.details["machine"]},
    }
    return [_folded(name, table(("", ""), _flat(value))) for name, value in facts.items()]


def _flat(value: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, item if isinstance(item, str) else json.dumps(item)) for name, item in value.items()]


def _kernel_parts(rows: Sequence[ResultRow]) -> list[str]:
    """A part for each GPU that the attention kernels were measured on."""
    devices = dict.fromkeys(row.device for row in rows if row.suite == "kernels")
    return [part for device in devices for part in _kernels_of([row for row in rows if row.device == device])]


def _kernels_of(rows: Sequence[ResultRow]) -> list[str]:
    """The attention kernels on one GPU."""
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
    return [f"<h2>{escape(title)}</h2>{_measured(kernels)}{shown}{_folded('every row', table(_KERNEL_HEADER, lines))}"]


def _other_parts(rows: Sequence[ResultRow]) -> list[str]:
    """Every other suite as a table: lookups of the tables, plugins, engines. The newest row of each device."""
    parts = []
    for suite in sorted({row.suite for row in rows} - {SUITE, "kernels"}):
        mine = [row for row in rows if row.suite == suite]
        devices = dict.fromkeys(row.device for row in mine)
        newest = [row for at in devices for row in latest(row for row in mine if row.device == at).values()]
        lines = [
            (
                row.case, row.variant, f"{row.median_us / 1e3:.3g}", f"{row.spread:.0%}",
                "" if row.per_s is None else f"{row.per_s:,.0f}",
                ", ".join(f"{name}: {value:.2f}" for name, value in row.ratio_to.items()),
                ", ".join(f"{name} {value:.3g}" for name, value in row.checks.items()),
                f"{row.device}, {row.date[:10]}, {row.commit[:12]}",
            )
            for row in newest
        ]  # fmt: skip
        parts.append(_folded(f"Suite {suite}: {len(lines)} rows", table(_OTHER_HEADER, lines)))
    return ["<h2>Other suites</h2>", *parts] if parts else []
