"""Load runs as rows of results, and as the table that people read.

A row of suite ``serve``: ``case`` is model, precision, flavour and workload, ``variant`` the served model and the
scenario; ``median_us`` is p50 and ``per_s`` the requests per second, medians over the repeats. ``details`` holds the
rest: the run in the middle, the repeats and their spread, flags, time per step, batches, machine and workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hstu_trt.bench.load.machine_watch import environment
from hstu_trt.bench.load.scenarios import Outcome
from hstu_trt.bench.load.serve_accuracy import Checks
from hstu_trt.bench.load.triton_statistics import TRITON, Statistics
from hstu_trt.bench.result_rows import Provenance, ResultRow
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES
from hstu_trt.contract.text import text_table

SUITE = "serve"
SHARED = "shared machine"
"""Other programs took part of the CPUs: tail latencies are partly theirs."""
_QUIET = 0.1
TABLE_HEADER = ("run", "req/s", "scores", "p50 ms", "p90 ms", "p99 ms", "spread p99", "asked/s", "cand/s", "flags")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A scenario's outcome with what was seen around it."""

    outcome: Outcome
    steps: Statistics = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    client: str = "hstu-trt"
    """What sent the load."""

    @property
    def answered(self) -> bool:
        """Whether any request of any repeat was: else there is no figure to put into a row."""
        return any(run.latency_ms for run in self.outcome.repeated.runs)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured, the same for all rows of a run."""

    case: str
    served: str
    """The model's name in Triton."""
    provenance: Provenance
    checks: Checks
    workload: Mapping[str, Any]
    deployment: Mapping[str, Any]


def workload_facts(requests: Requests) -> dict[str, Any]:
    """A workload's manifest: where it comes from, lengths, a histogram."""
    import numpy as np

    lengths = requests.history_lengths
    edges = [0, 1, 8, 32, 128, 512, 2048, 8192, 1 << 30]
    counts = np.histogram(lengths, bins=edges)[0]
    return {
        "source": requests.source,
        "requests": len(requests),
        "history": {
            "mean": round(float(lengths.mean()), 2),
            **{f"p{q}": float(np.percentile(lengths, q)) for q in (50, 90, 99)},
            "max": int(lengths.max()),
        },
        "candidates_mean": round(float(requests.candidate_counts.mean()), 2),
        "history_histogram": {str(edge): int(count) for edge, count in zip(edges, counts, strict=False)},
    }


def row_of(subject: Subject, measured: Measured) -> ResultRow:
    """A measured scenario as a row."""
    outcome, repeated = measured.outcome, measured.outcome.repeated
    per_s = repeated.median("per_s")
    candidates = float(subject.workload["candidates_mean"])
    tokens = float(subject.workload["history"]["mean"]) + candidates
    client = "" if measured.client == "hstu-trt" else f" by {measured.client}"
    return ResultRow(
        **vars(subject.provenance),
        suite=SUITE,
        case=subject.case,
        variant=f"{subject.served} {outcome.name}{client}",
        median_us=1e3 * repeated.median("p50"),
        spread=repeated.spread("p50"),
        per_s=per_s,
        checks=dict(subject.checks.figures),
        details={
            "served": subject.served,
            "scenario": outcome.scenario,
            "client": measured.client,
            "run": repeated.middle.facts(),
            "flags": [*repeated.flags, *([SHARED] if (measured.machine.get("others_cpu") or 0) > _QUIET else [])],
            "repeats": [
                {"per_s": round(run.per_s, 3), **{p: round(run.latency_ms.get(p, 0.0), 4) for p in ("p50", "p99")}}
                for run in repeated.runs
            ],
            "spread": {name: round(repeated.spread(name), 4) for name in ("per_s", "p50", "p99")},
            "candidates_per_s": round(per_s * candidates, 1),
            "tokens_per_s": round(per_s * tokens, 1),
            "steps": {name: model.facts() for name, model in measured.steps.items()},
            "machine": dict(measured.machine),
            "found": outcome.found,
            "workload": dict(subject.workload),
            "deployment": dict(subject.deployment),
            "environment": environment(),
        },
    )


def load_table(rows: Sequence[ResultRow]) -> str:
    """Rows of suite ``serve`` for people, the verdict on their scores beside them."""
    return text_table(TABLE_HEADER, [table_cells(row) for row in rows])


def table_cells(row: ResultRow) -> tuple[Any, ...]:
    """The cells of a row under TABLE_HEADER."""
    run, spread = row.details["run"], row.details["spread"]
    latency = run["latency_ms"]
    asked = run["requested_per_s"]
    return (
        row.variant,
        f"{row.per_s or 0:.1f}",
        score_verdict(row),
        *(f"{latency[p]:.2f}" if p in latency else "" for p in ("p50", "p90", "p99")),
        f"{spread['p99']:.0%}",
        "" if asked is None else f"{asked:.1f}",
        f"{row.details['candidates_per_s']:.0f}",
        ", ".join(row.details["flags"]) or "valid",
    )


def score_verdict(row: ResultRow) -> str:
    """What the checks of a row say about its scores."""
    if "gates_failed" not in row.checks:
        return "UNCHECKED"
    failed, gates = int(row.checks["gates_failed"]), int(row.checks["gates"])
    return f"{failed} of {gates} gates MISSED" if failed else f"{gates} of {gates} gates"


def own_steps(row: ResultRow) -> dict[str, Any]:
    """What a row says of the models that its requests went through: the ensemble's stages and itself, or one model.

    Rows hold all that Triton counted, the models too that the probes of the server's own supervisor went through.
    """
    served, steps = row.details["served"], row.details["steps"]
    names = (*STAGES, ENSEMBLE) if served == ENSEMBLE else (served,)
    return {name: steps[name] for name in names if name in steps}


def sees_queues(row: ResultRow) -> bool:
    """Whether a row's steps tell waits and batches. By Triton they end where our models take requests out of its queue.

    Rows from before our models did so name no source, and Triton's statistics were right.
    """
    steps, served = own_steps(row), row.details["served"]
    door = STAGES[0] if served == ENSEMBLE else served
    return bool(steps) and not (served in (ENSEMBLE, FUSED) and steps.get(door, {}).get("source") == TRITON)


def steps_table(rows: Sequence[ResultRow]) -> str:
    """Milliseconds per request of each step, by our metrics where requests wait, else by Triton's."""
    header = ("run", "model", "batch", "queue", "input", "compute", "output", "total ms")
    lines = []
    for row in rows:
        for name, step in own_steps(row).items():
            ms = step["ms"]
            parts = (f"{ms[p]:.2f}" for p in ("queue", "compute_input", "compute_infer", "compute_output", "total"))
            batch = "" if step["mean_batch"] is None else f"{step['mean_batch']:.2f}"
            lines.append((row.variant, name, batch, *parts))
    return text_table(header, lines)
