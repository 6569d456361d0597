"""A fuzzing run as a table for people, or as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from hstu_trt.contract.text import text_table

MOST_SHOWN = 20
"""Findings; the rest mostly say the same."""

if TYPE_CHECKING:
    from hstu_trt.bench.fuzz.verb import Report


def report_text(report: Report) -> str:
    """Outcomes by kind and status, what the server held, and the findings."""
    counts = report.result.counts
    codes = [code for code, _ in _by_code(counts).most_common()]
    kinds = sorted({kind for kind, _ in counts}, key=lambda kind: -sum(counts[kind, code] for code in codes))
    rows = [(kind, sum(counts[kind, c] for c in codes), *(counts[kind, c] or "" for c in codes)) for kind in kinds]
    rows.append(("all", counts.total(), *(_by_code(counts)[code] for code in codes)))
    lines = [text_table(("mutation", "requests", *codes), rows)]
    lines.append(
        f"slowest answer {report.result.slowest_s:.2f} s; {sum(report.wire.values())} connections that were no gRPC"
    )
    if report.result.shed:
        lines.append(f"{report.result.shed} shed, and not judged: a deployment with a longer --queue answers all")
    lines += [f"{large.kind}: {large.status} after {large.seconds:.1f} s" for large in report.large]
    lines += [
        f"{when}: {held.text}"
        for when, held in zip(("before", "after requests", "after large ones"), report.held, strict=False)
    ]
    lines += [f"FINDING {fault}" for fault in report.faults]
    lines += [
        f"FINDING seed {report.plan.seed} case {found.case.number} ({found.case.kind}): {found.what}"
        for found in report.result.findings[:MOST_SHOWN]
    ]
    lines += [f"replay with --replay {path}" for path in report.files]
    verdict = "no finding" if report.is_clean else "FINDINGS"
    lines.append(f"{verdict}: seed {report.plan.seed}, {counts.total()} requests in {report.seconds:.0f} s")
    return "\n".join(lines)


def _by_code(counts: Counter[tuple[str, str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for (_, code), count in counts.items():
        total[code] += count
    return total


def report_json(report: Report) -> dict[str, Any]:
    """The same, by name."""
    counts = report.result.counts
    return {
        "seed": report.plan.seed,
        "requests": counts.total(),
        "seconds": report.seconds,
        "slowest_s": report.result.slowest_s,
        "shed": report.result.shed,
        "by_status": dict(_by_code(counts)),
        "by_kind": {
            kind: {c: n for (k, c), n in counts.items() if k == kind} for kind in sorted({k for k, _ in counts})
        },
        "wire": report.wire,
        "large": [dataclasses.asdict(large) for large in report.large],
        "held": [dataclasses.asdict(held) for held in report.held],
        "faults": report.faults,
        "findings": [
            {"number": found.case.number, "kind": found.case.kind, "what": found.what}
            for found in report.result.findings[:MOST_SHOWN]
        ],
        "files": [str(path) for path in report.files],
        "ok": report.is_clean,
    }
