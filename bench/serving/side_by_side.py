"""``hstu-trt bench side-by-side``: a CPU deployment beside PyTorch eager in a Triton Python backend, in the same run.

Both servers are up; the load goes to one at a time, in turn, so that what else the machine does falls on both. Each
round measures every contender offline and then at one rate, the same for all: what the baseline bears with ease.
The baseline serves as it comes, and tuned to an instance per core; the better one counts.
Exit code 1 if a served model's scores miss a gate, or it is not as far ahead as ``--at-least`` asks.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.bench.arguments import positive, suite_parser
from hstu_trt.bench.load.machine_watch import MachineWatch
from hstu_trt.bench.load.options import add_plan_options, plan_of, reference_of, requests_of
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.provenance import provenance_here, results_file
from hstu_trt.bench.load.rows import Measured, row_of
from hstu_trt.bench.load.runs import report
from hstu_trt.bench.load.scenarios import Outcome, Plan, Scenarios, result_text
from hstu_trt.bench.load.stats import LoadResult, Repeated
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.load.triton_statistics import Statistics, added, read_statistics
from hstu_trt.bench.load.workbench import Workbench, open_workbench, running
from hstu_trt.bench.result_rows import ResultRow
from hstu_trt.bench.serving.eager_repository import EAGER, eager_server
from hstu_trt.serving.deployment import read_deployment

GATE_EXIT_CODE = 1
_EASY = 0.5
"""The common rate, as a share of what the baseline does offline."""


@dataclass(kw_only=True)
class Contender:
    """A served model under the load, and its runs."""

    served: str
    bench: Workbench
    runs: Scenarios
    results: dict[str, list[LoadResult]] = field(default_factory=dict)
    steps: dict[str, Statistics] = field(default_factory=dict)
    machine: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, scenario: str, rate: float | None, turn: int) -> None:
        """One run, noted."""
        before = read_statistics(self.bench.url)
        with MachineWatch() as watch:
            if rate is not None:
                result = self.runs.at_rate(rate, self.runs.plan.seconds, turn)
            else:
                result = getattr(self.runs, scenario)().repeated.runs[0]
        self.machine[scenario] = watch.facts()
        self.results.setdefault(scenario, []).append(result)
        self.steps[scenario] = added(before, read_statistics(self.bench.url))
        print(f"{self.served} {scenario}: {result_text(result)}", file=sys.stderr, flush=True)

    def median(self, scenario: str, name: str) -> float:
        """Median over the rounds of a figure."""
        return Repeated(runs=self.results[scenario]).median(name)


def measure(contenders: Sequence[Contender], plan: Plan) -> float:
    """All rounds; returns the common rate."""
    for contender in contenders:
        contender.runs.warm_up()
    rate = 0.0
    for turn in range(plan.repeats):
        for contender in contenders:
            contender.run("single", None, turn)
        for contender in contenders:
            contender.run("offline", None, turn)
        if not turn:
            rate = _EASY * max(c.median("offline", "per_s") for c in contenders if c.served in EAGER)
        for contender in contenders:
            contender.run("open", rate, turn)
    return rate


def rows_of(contenders: Sequence[Contender], plan: Plan, rate: float, commit: str | None) -> list[ResultRow]:
    """A row per contender and scenario, each with its ratio to the baseline: requests per second, and 1 / p99."""
    settings = {"single": "", "offline": f"{plan.in_flight} in flight", "open": f"{rate:.4g}/s"}
    eager = [contender for contender in contenders if contender.served in EAGER]
    rows = []
    for contender in contenders:
        subject = contender.bench.subject(contender.served, provenance_here(commit))
        subject = dataclasses.replace(subject, case=f"{subject.case}, beside PyTorch eager")
        for scenario, setting in settings.items():
            repeated = Repeated(runs=contender.results[scenario])
            outcome = Outcome(scenario=scenario, setting=setting, repeated=repeated)
            row = row_of(
                subject, Measured(outcome=outcome, steps=contender.steps[scenario], machine=contender.machine[scenario])
            )
            if contender not in eager:
                found = [ratios(contender, baseline, scenario) for baseline in eager]
                row = dataclasses.replace(row, ratio_to={name: ratio for one in found for name, ratio in one.items()})
            rows.append(row)
    return rows


def ratios(contender: Contender, eager: Contender, scenario: str) -> dict[str, float]:
    """How many times better than the baseline: medians over rounds of the ratio within a round."""
    pairs = list(zip(contender.results[scenario], eager.results[scenario], strict=True))
    found = {f"{eager.served} p99": statistics.median(theirs.at(99) / ours.at(99) for ours, theirs in pairs)}
    if scenario != "open":  # there the rate is given
        found[eager.served] = statistics.median(ours.per_s / theirs.per_s for ours, theirs in pairs)
    return {name: round(value, 4) for name, value in found.items()}


def shortfalls(rows: Sequence[ResultRow], at_least: float) -> list[str]:
    """What is missing: the best served model must reach the ratio offline, and a better p99 at the common rate."""
    offline, p99 = (_best(rows, scenario, suffix) for scenario, suffix in (("offline", ""), ("open", " p99")))
    found = [] if offline >= at_least else [f"offline {offline:.2f} times the baseline's requests/s, not {at_least:g}"]
    return found if p99 > 1 else [*found, f"p99 at the common rate is {1 / p99 if p99 else 0:.2f} times the baseline's"]


def _best(rows: Sequence[ResultRow], scenario: str, suffix: str) -> float:
    """The best served model's ratio to the better baseline."""
    ours = [row for row in rows if row.details["scenario"] == scenario and row.ratio_to]
    return max((min(row.ratio_to[name + suffix] for name in EAGER) for row in ours), default=0.0)


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = suite_parser("side-by-side", __doc__)
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--at-least", type=positive, default=1.5, help="times the baseline's requests/s (default: 1.5)")
    parser.add_argument("--work", type=Path, default=Path("build/eager"), help="for the baseline's server")
    add_plan_options(parser, without=("probe_seconds",))
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    plan = dataclasses.replace(plan_of(args), repeats=1)
    rounds = dataclasses.replace(plan, repeats=args.repeats)
    deployment = read_deployment(args.deployment)
    requests = requests_of(args, deployment.model)
    with ExitStack() as stack:
        url, version, _ = stack.enter_context(running(deployment))
        eager_url = stack.enter_context(eager_server(deployment, args.work))
        bench = open_workbench(
            deployment, requests, url, version,
            checked=args.check, reference=reference_of(args, deployment.model), device=args.reference_device,
        )  # fmt: skip
        contenders = []
        for served, where in (*((name, eager_url) for name in EAGER), *((name, url) for name in deployment.served)):
            address = TritonAddress(url=where, model=served, timeout_s=args.timeout)
            clients = stack.enter_context(Clients(address, bench.packed, processes=args.clients))
            runs = Scenarios(sender=clients, plan=plan, progress=lambda text: None)
            contenders.append(Contender(served=served, bench=dataclasses.replace(bench, url=where), runs=runs))
        rate = measure(contenders, rounds)
        rows = rows_of(contenders, plan, rate, args.commit)
    failures = [f"{row.variant}: scores miss a gate" for row in rows if row.checks["gates_failed"]]
    failures += shortfalls(rows, args.at_least)
    for row in rows:
        if row.ratio_to:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in row.ratio_to.items())
            print(f"{row.variant}: times better than {shown}", file=sys.stderr)
    return report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)
