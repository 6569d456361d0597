"""Made-up load rows: what ``hstu-trt bench serve`` would have measured on a server that we know."""

import dataclasses
import multiprocessing
from typing import Any

from hstu_trt.bench.load.target import CallableTarget
from hstu_trt.bench.result_rows import ResultRow

_CHECKS = {"max_abs": 1e-7, "max_abs_allowed": 2e-5, "gates": 5.0, "gates_failed": 0.0}


def load_row(
    scenario: str, setting: str = "", *, served: str = "ranking_fused", per_s: float = 100.0, p50: float = 4.0,
    p99: float = 9.0, asked: float | None = None, **details: Any,
) -> ResultRow:  # fmt: skip
    """A row of suite ``serve``; further details by name."""
    latency = {"min": p50 / 2, "mean": p50, "p50": p50, "p90": (p50 + p99) / 2, "p95": p99, "p99": p99, "max": p99 * 2}
    run = {"requests": 2000, "seconds": 10.0, "per_s": per_s, "requested_per_s": asked, "latency_ms": latency}
    ms = {"queue": 1.0, "compute_input": 0.1, "compute_infer": 2.0, "compute_output": 0.1, "total": 3.2}
    step = {"inferences": 2000, "executions": 1000, "failures": 0, "ms": ms, "mean_batch": 2.0}
    batches = {"1": [400, 2.0], "2": [300, 3.0], "8": [300, 6.0]}
    known = {
        "served": served,
        "scenario": scenario,
        "client": "hstu-trt",
        "run": run,
        "flags": [],
        "repeats": [],
        "spread": {"per_s": 0.02, "p50": 0.02, "p99": 0.05},
        "candidates_per_s": per_s * 32,
        "tokens_per_s": per_s * 60,
        "steps": {served: {**step, "batches": batches}},
        "machine": {"cpu_busy": 0.5, "gpu": None},
        "found": {},
        "workload": {"source": "profile ci, seed 1", "history": {"mean": 22.0}, "candidates_mean": 32.0},
        "deployment": {"model": "debug"},
        "environment": {"cpus": 2, "gpu": None},
    }
    return ResultRow(
        suite="serve",
        case="debug fp32 cpu, profile ci, seed 1",
        variant=f"{served} {scenario} {setting}".strip(),
        device="a CPU",
        date="2026-11-22T10:00:00Z",
        commit="abc",
        versions={"python": "3.11"},
        median_us=1e3 * p50,
        spread=0.02,
        per_s=per_s,
        checks=dict(_CHECKS),
        details=known | details,
    )


def a_run() -> list[ResultRow]:
    """One run of two served models: single, offline, server and a curve."""
    rows = []
    for served in ("ranking", "ranking_fused"):
        rows += [load_row("single", served=served), load_row("offline", "64 in flight", served=served, per_s=400.0)]
        found = {"rate": 200.0, "bound": "p99 <= 80 ms", "kept": True, "probes": []}
        rows.append(load_row("server", "p99 <= 80 ms", served=served, per_s=201.0, asked=200.0, found=found))
        rows += [
            load_row("open", f"{rate}/s", served=served, per_s=rate, asked=rate, p99=9.0 + rate / 10)
            for rate in (50.0, 100.0, 200.0)
        ]
    return rows


def later(rows: list[ResultRow], **changes: Any) -> list[ResultRow]:
    """The same runs a day later, changed."""
    return [dataclasses.replace(row, date="2026-11-23T10:00:00Z", **changes) for row in rows]


class Echo:
    """An address whose target answers with the request's numbers; travels to other processes."""

    def open(self) -> CallableTarget:
        return CallableTarget(lambda request: request["n"])


class Dies(Echo):
    """Its target cannot be opened in another process."""

    def open(self) -> CallableTarget:
        if multiprocessing.parent_process() is not None:
            raise SystemExit(7)
        return super().open()
