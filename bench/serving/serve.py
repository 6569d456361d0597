"""``hstu-trt bench serve``: puts a deployment under load and adds rows to the results.

Starts the deployment (or takes a running server of it), holds its scores against PyTorch, then runs the scenarios.
Exit code 1 if a gate of the scores was missed, or a server search found no rate within its bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.bench.arguments import counts, positive, rates, some_of, suite_parser
from hstu_trt.bench.load.metrics import metrics_port_for
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
from hstu_trt.bench.load.rows import row_of
from hstu_trt.bench.load.runs import Watched, progress_of, report
from hstu_trt.bench.load.scenarios import SCENARIOS, Plan, sweep_rates
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.load.workbench import open_workbench, running
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.serving.deployment import Deployment, read_deployment


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("serve", __doc__)
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--url", help="host:port of a running server of it (default: one is started)")
    add_served_option(parser)
    chosen = ("single", "offline", "server", "open")
    text = f"of {','.join(SCENARIOS)} (default: {','.join(chosen)})"
    parser.add_argument("--scenarios", type=some_of(SCENARIOS, "scenarios"), default=chosen, help=text)
    add_plan_options(parser)
    parser.add_argument("--in-flight", type=counts, default=(1, 4, 8), help="closed: as in 1,4,8 (the default)")
    parser.add_argument(
        "--rates", type=rates, default=(), help="open: requests per second (default: shares of the highest rate)"
    )
    parser.add_argument("--guess", type=positive, default=0.0, help="server: rate at which the search begins")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and for how long")
    return parser


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    plan = plan_of(args)
    deployment = read_deployment(args.deployment)
    served = served_of(args, deployment)
    requests = requests_of(args, deployment.model)
    if args.dry_run:
        print(_dry_run(deployment, requests, served, plan, args))
        return 0
    reference = reference_of(args, deployment.model)
    rows, failures = [], []
    interrupted: KeyboardInterrupt | None = None
    metrics = metrics_port_for(deployment) if args.url is None else None
    with running(deployment, args.url, metrics.port if metrics else None) as (url, version, _):
        bench = open_workbench(
            deployment, requests, url, version, checked=args.check, reference=reference, device=args.reference_device
        )
        for name in served:
            subject = bench.subject(name, provenance_here(args.commit))
            failures += [f"{name}: {failure}" for failure in subject.checks.failures]
            print(f"{name} scores: {subject.checks.text}", file=sys.stderr, flush=True)
            address = TritonAddress(url=url, model=name, timeout_s=args.timeout)
            with Clients(address, bench.packed, processes=args.clients) as clients:
                watched = Watched.of(url, clients, plan, progress_of(name), metrics)
                watched.own_server = args.url is None
                try:
                    watched.run_all(args.scenarios, args.in_flight, args.rates, args.guess)
                except KeyboardInterrupt as caught:
                    interrupted = caught
            found = watched.found
            rows += [row_of(subject, measured) for measured in found if measured.answered]
            failures += [f"{name} {m.outcome.name}: no request was answered" for m in found if not m.answered]
            failures += [
                f"{name}: no rate within {m.outcome.found['bound']}"
                for m in found
                if not m.outcome.found.get("kept", True)
            ]
            if interrupted is not None:
                break
    if not rows:
        raise interrupted or HstuTrtError(f"there is no row to write: {'; '.join(failures)}")
    code = report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)
    if interrupted is not None:  # the rows hold the scenarios that had ended
        raise interrupted
    return code


def _dry_run(
    deployment: Deployment, requests: Requests, served: Sequence[str], plan: Plan, args: argparse.Namespace
) -> str:
    """What would be run on each served model, and for how long."""
    runs, open_rates = f"{plan.repeats} runs of {plan.seconds:g} s", args.rates or tuple(sweep_rates(1.0))
    shown = ", ".join(f"{rate:g}/s" if args.rates else f"{rate:.0%}" for rate in open_rates)
    texts = {
        "single": f"{plan.repeats} runs of {plan.single_requests} requests",
        "closed": f"{', '.join(map(str, args.in_flight))} in flight, {runs} each",
        "offline": f"{plan.in_flight} in flight, {runs}",
        "server": f"{plan.bound.text}: a search by probes of {plan.probe_seconds:g} s, then {runs}",
        "open": f"{shown}{'' if args.rates else ' of the highest rate'}, {runs} each",
    }
    return "\n".join(
        [
            f"deployment  {deployment.path} ({deployment.flavour}, {deployment.model.precision})",
            f"requests    {len(requests)} ({requests.source}), {requests.history_lengths.mean():.0f} events on average",
            f"served      {', '.join(served)}",
            *(f"{scenario:<11} {texts[scenario]}" for scenario in SCENARIOS if scenario in args.scenarios),
        ]
    )
