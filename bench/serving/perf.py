"""``hstu-trt bench perf``: perf_analyzer on a deployment, and our own client at the same settings in the same run.

The two send the same requests in turn, and the rows of both go to the results. They should agree: by how much they
differ is printed and written beside the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.bench.arguments import counts, rates, suite_parser
from hstu_trt.bench.load.machine_watch import MachineWatch
from hstu_trt.bench.load.options import (
    add_plan_options,
    add_served_option,
    plan_of,
    reference_of,
    requests_of,
    served_of,
)
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.provenance import provenance_here, results_file
from hstu_trt.bench.load.rows import Measured, row_of
from hstu_trt.bench.load.runs import report
from hstu_trt.bench.load.scenarios import Outcome, Plan, Scenarios
from hstu_trt.bench.load.stats import BEHIND, UNSTABLE, LoadResult, Repeated, summarise
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.load.triton_statistics import added, read_statistics
from hstu_trt.bench.load.workbench import Workbench, open_workbench, running
from hstu_trt.bench.result_rows import ResultRow
from hstu_trt.bench.serving import perf_analyzer
from hstu_trt.bench.serving.perf_analyzer import PerfAnalyzer, Setting
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.text import text_table
from hstu_trt.serving.deployment import read_deployment

_COMPARED = ("per_s", "p50", "p90", "p99")
_FEWEST_PER_WINDOW = 50


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One setting, measured by both."""

    setting: Setting
    ours: Measured
    theirs: Measured

    def ratios(self) -> dict[str, float]:
        """Figure -> perf_analyzer's over ours."""
        ours, theirs = self.ours.outcome.repeated, self.theirs.outcome.repeated
        return {name: round(theirs.median(name) / ours.median(name), 4) for name in _COMPARED if ours.median(name)}


def measure_pair(
    bench: Workbench, address: TritonAddress, setting: Setting, plan: Plan, tool: PerfAnalyzer, folder: Path
) -> Pair:
    """Our client first, which tells how many requests make a window, then perf_analyzer; repeated in turn."""
    served = address.model
    ours: list[LoadResult] = []
    theirs: list[LoadResult] = []
    with Clients(address, bench.packed) as clients:
        quiet = dataclasses.replace(plan, repeats=1)
        runs = Scenarios(sender=clients, plan=quiet, progress=lambda text: None)
        runs.warm_up()
        watches, steps = [], []
        for turn in range(plan.repeats):
            before = read_statistics(bench.url)
            with MachineWatch() as watch:
                ours.append(_ours(runs, setting, turn))
            watches.append(watch.facts())
            between = read_statistics(bench.url)
            steps.append(added(before, between))
            theirs.append(_theirs(bench, served, setting, ours[-1], tool, folder))
            steps_theirs = added(between, read_statistics(bench.url))
            _say(served, setting, ours[-1], theirs[-1])
    scenario = "closed" if setting.rate is None else "open"
    text = f"{setting.in_flight} in flight" if setting.rate is None else f"{setting.rate:.4g}/s"
    outcomes = [Outcome(scenario=scenario, setting=text, repeated=Repeated(runs=runs)) for runs in (ours, theirs)]
    return Pair(
        setting=setting,
        ours=Measured(outcome=outcomes[0], steps=steps[-1], machine=watches[-1]),
        theirs=Measured(outcome=outcomes[1], steps=steps_theirs, client=perf_analyzer.NAME),
    )


def _ours(runs: Scenarios, setting: Setting, turn: int) -> LoadResult:
    if setting.rate is not None:
        return runs.at_rate(setting.rate, runs.plan.seconds, turn)
    return runs.closed(setting.in_flight or 1).repeated.runs[0]


def _theirs(
    bench: Workbench, served: str, setting: Setting, ours: LoadResult, tool: PerfAnalyzer, folder: Path
) -> LoadResult:
    window = max(_FEWEST_PER_WINDOW, ours.requests // 3)
    before = os.times()
    run = perf_analyzer.run(
        tool, bench.url, served, setting, folder, window=window, timeout_s=60 + 40 * max(1.0, ours.seconds)
    )
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    result = summarise(dataclasses.replace(run.records, cpu_s=0.0), requested_per_s=setting.rate)
    flags = list(result.flags)
    if not run.stable and UNSTABLE not in flags:
        flags.append("windows disagree")
    if setting.rate is not None and (not run.keeps_up or result.sent_per_s < 0.95 * setting.rate):
        flags.append(BEHIND)
    return dataclasses.replace(result, flags=tuple(flags), client_cpu=cpu_s / max(result.seconds, 1e-9))


def _say(served: str, setting: Setting, ours: LoadResult, theirs: LoadResult) -> None:
    text = f"{served} {' '.join(setting.flags())}"
    for name, result in (("ours", ours), (perf_analyzer.NAME, theirs)):
        flags = f"  [{', '.join(result.flags)}]" if result.flags else ""
        text += f"\n  {name:<14} {result.per_s:.4g}/s, p50 {result.at(50):.4g} ms, p99 {result.at(99):.4g} ms{flags}"
    print(text, file=sys.stderr, flush=True)


def rows_of(bench: Workbench, served: str, pairs: Sequence[Pair], commit: str | None) -> list[ResultRow]:
    """Two rows per pair; that of perf_analyzer says how far it is from ours."""
    subject = bench.subject(served, provenance_here(commit))
    rows = []
    for pair in pairs:
        theirs = row_of(subject, pair.theirs)
        rows += [
            row_of(subject, pair.ours),
            dataclasses.replace(theirs, details=theirs.details | {"to_ours": pair.ratios()}),
        ]
    return rows


def agreement_table(served: str, pairs: Sequence[Pair]) -> str:
    """perf_analyzer's figures over ours."""
    header = ("perf_analyzer / ours", *_COMPARED)
    rows = [
        (f"{served} {pair.ours.outcome.name}", *(f"{pair.ratios().get(name, float('nan')):.2f}" for name in _COMPARED))
        for pair in pairs
    ]
    return text_table(header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("perf", __doc__)
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--url", help="host:port of a running server of it (default: one is started)")
    add_served_option(parser)
    text = "requests in flight, as in 1,4,8 (the default; '' for none)"
    parser.add_argument("--concurrency", type=counts, default=(1, 4, 8), help=text)
    parser.add_argument("--rates", type=rates, default=(), help="Poisson arrivals per second, as in 50,100")
    parser.add_argument("--perf-analyzer", type=Path, help="binary (default: on PATH, else in build/perf_analyzer)")
    parser.add_argument("--work", type=Path, default=Path("build/perf"), help="for its files (default: build/perf)")
    add_plan_options(parser, without=("probe_seconds", "offline_in_flight", "single_requests", "clients"))
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print perf_analyzer's command lines")
    return parser


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    plan, tool = plan_of(args), perf_analyzer.find_perf_analyzer(args.perf_analyzer)
    settings = [Setting(in_flight=number) for number in args.concurrency] + [Setting(rate=rate) for rate in args.rates]
    if not settings:
        raise ConfigError("nothing to measure: give --concurrency or --rates")
    deployment = read_deployment(args.deployment)
    served = served_of(args, deployment)
    if args.dry_run:
        for name in served:
            for setting in settings:
                line = perf_analyzer.command(
                    tool, "URL", name, setting, args.work, window=_FEWEST_PER_WINDOW, stability=30
                )
                print(" ".join(line))
        return 0
    print(f"perf_analyzer {tool.version()}", file=sys.stderr)
    requests = requests_of(args, deployment.model)
    reference = reference_of(args, deployment.model)
    rows, failures, tables = [], [], []
    with running(deployment, args.url) as (url, version, _):
        bench = open_workbench(
            deployment, requests, url, version,
            checked=args.check, reference=reference, device=args.reference_device,
        )  # fmt: skip
        for name in served:
            perf_analyzer.write_input_data(perf_analyzer.input_file(args.work, name), name, bench.packed)
            address = TritonAddress(url=url, model=name, timeout_s=args.timeout)
            pairs = [measure_pair(bench, address, setting, plan, tool, args.work) for setting in settings]
            rows += rows_of(bench, name, pairs, args.commit)
            failures += [f"{name}: {failure}" for failure in bench.check_scores(name).failures]
            tables.append(agreement_table(name, pairs))
    print("\n".join(tables), file=sys.stderr)
    return report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)
