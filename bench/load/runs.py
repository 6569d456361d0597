"""Runs the chosen scenarios on a target, and reports their rows."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hstu_trt.bench.load.machine_watch import MachineWatch
from hstu_trt.bench.load.metrics import MetricsPort
from hstu_trt.bench.load.rows import Measured, load_table, steps_table
from hstu_trt.bench.load.scenarios import Outcome, Plan, Scenarios, Sender, sweep_rates
from hstu_trt.bench.load.triton_statistics import Statistics, added, read_statistics
from hstu_trt.bench.result_rows import ResultRow, append_rows

GATE_EXIT_CODE = 1


@dataclass(kw_only=True)
class Watched:
    """Runs scenarios on a served model, with Triton's statistics and the machine's around the runs of each."""

    url: str | None
    """Of the Triton server whose statistics are read; None: the target is in this process."""
    runs: Scenarios
    metrics: MetricsPort | None = None
    """Tells waits and batches where Triton's statistics do not; None: the rows hold Triton's."""
    own_server: bool = True
    """Whether this process started the server."""
    found: list[Measured] = field(default_factory=list)
    _before: Statistics = field(default_factory=dict)

    @classmethod
    def of(
        cls, url: str | None, clients: Sender, plan: Plan, progress: Callable[[str], None],
        metrics: MetricsPort | None = None,
    ) -> Watched:  # fmt: skip
        """Warmed up."""
        watched = cls(url=url, runs=Scenarios(sender=clients, plan=plan, progress=progress), metrics=metrics)
        watched.runs = dataclasses.replace(watched.runs, before_repeats=watched.mark)
        watched.runs.warm_up()
        return watched

    def mark(self) -> None:
        """Counters from here on are those of the next outcome."""
        self._before = self._counters()

    def _counters(self) -> Statistics:
        if self.metrics is not None:
            time.sleep(self.metrics.settle_s)
        by_triton = read_statistics(self.url) if self.url else {}
        return by_triton | (self.metrics.read() if self.metrics is not None else {})

    def run(self, scenario: str, *setting: float) -> Outcome:
        """One scenario, noted."""
        with MachineWatch(own_server=self.own_server) as watch:
            outcome: Outcome = getattr(self.runs, scenario)(*setting)
        steps = added(self._before, self._counters())
        self.found.append(Measured(outcome=outcome, steps=steps, machine=watch.facts()))
        return outcome

    def run_all(self, scenarios: Sequence[str], in_flight: Sequence[int], rates: Sequence[float], guess: float) -> None:
        """The chosen scenarios, each knowing the throughput that those before it found. A guess of 0 means none."""
        most = 0.0
        if "single" in scenarios:
            self.run("single")
        for number in in_flight if "closed" in scenarios else ():
            self.run("closed", number)
        if "offline" in scenarios:
            most = self.run("offline").repeated.median("per_s")
        if not most and {"server", "open"} & set(scenarios):
            most = _quick_offline(self.runs)
        highest = 0.8 * most
        if "server" in scenarios:
            highest = float(self.run("server", guess or 0.6 * most).found["rate"])
        for rate in (rates or sweep_rates(highest)) if "open" in scenarios else ():
            self.run("open", rate)


def _quick_offline(runs: Scenarios) -> float:
    """A first idea of the throughput."""
    short = dataclasses.replace(runs.plan, seconds=min(3.0, runs.plan.seconds), repeats=1)
    return dataclasses.replace(runs, plan=short).offline().repeated.median("per_s")


def progress_of(served: str) -> Callable[[str], None]:
    """Prints what a served model does to stderr."""
    return lambda text: print(f"{served} {text}", file=sys.stderr, flush=True)


def report(rows: Sequence[ResultRow], failures: Sequence[str], out: Path, *, as_json: bool) -> int:
    """Writes the rows, prints them, and returns the exit code."""
    append_rows(out, rows)
    if as_json:
        print("[" + ",\n ".join(row.to_json() for row in rows) + "]")
    else:
        print(f"{rows[0].case} on {rows[0].device}\n{load_table(rows)}")
        if any(row.details["steps"] for row in rows):
            print(f"\n{steps_table(rows)}")
    print(f"{len(rows)} rows added to {out}, commit {rows[0].commit}", file=sys.stderr)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return GATE_EXIT_CODE if failures else 0
