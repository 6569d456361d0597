"""``hstu-trt bench serve``: puts a deployment under load and adds rows to the results.

Starts the deployment (or takes a running server of it), holds its scores against PyTorch, then runs the scenarios.
Exit code 1 if a gate of the scores was missed, or a server search found no rate within its bound.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.bench.load.metrics import metrics_port_for
from hstu_trt.bench.load.options import add_plan_options, add_served_option, plan_of, requests_of, served_of
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.provenance import provenance_here, results_file
from hstu_trt.bench.load.rows import row_of
from hstu_trt.bench.load.runs import Watched, progress_of, report
from hstu_trt.bench.load.scenarios import SCENARIOS, Plan
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.load.workbench import open_workbench, running
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.deployment import Deployment, read_deployment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt bench serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--url", help="host:port of a running server of it (default: one is started)")
    add_served_option(parser)
    names = f"of {','.join(SCENARIOS)} (default: single,offline,server,open)"
    parser.add_argument("--scenarios", default="single,offline,server,open", help=names)
    add_plan_options(parser)
    parser.add_argument("--in-flight", type=_integers, default=[1, 4, 8], help="closed: as in 1,4,8 (the default)")
    parser.add_argument("--rates", type=_floats, help="open: requests per second (default: shares of the highest rate)")
    parser.add_argument("--guess", type=float, help="server: rate at which the search begins")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and for how long")
    return parser


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    plan, scenarios = plan_of(args), args.scenarios.split(",")
    unknown = set(scenarios) - set(SCENARIOS)
    if unknown:
        raise ConfigError(f"unknown scenarios {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    deployment = read_deployment(args.deployment)
    served = served_of(args, deployment)
    requests = requests_of(args, deployment.model)
    if args.dry_run:
        print(_dry_run(deployment, requests, served, scenarios, plan))
        return 0
    # A terminated run must stop its server, too: the interrupt unwinds through the code that drains it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reference = read_model_folder(args.reference) if args.reference else deployment.model
    rows, failures = [], []
    interrupted: KeyboardInterrupt | None = None
    metrics = metrics_port_for(deployment) if args.url is None else None
    with running(deployment, args.url, metrics.port if metrics else None) as (url, version, _):
        checked = min(args.check, len(requests))
        bench = open_workbench(
            deployment, requests, url, version, checked=checked, reference=reference, device=args.reference_device
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
                    watched.run_all(scenarios, args.in_flight, args.rates or (), args.guess or 0.0)
                except KeyboardInterrupt as caught:
                    interrupted = caught
            found = watched.found
            rows += [row_of(subject, measured) for measured in found]
            failures += [
                f"{name}: no rate within {m.outcome.found['bound']}"
                for m in found
                if not m.outcome.found.get("kept", True)
            ]
            if interrupted is not None:
                break
    if interrupted is not None and not rows:
        raise interrupted
    code = report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)
    if interrupted is not None:  # the rows hold the scenarios that had ended
        raise interrupted
    return code


def _dry_run(
    deployment: Deployment, requests: Requests, served: Sequence[str], scenarios: Sequence[str], plan: Plan
) -> str:
    lengths = requests.history_lengths
    return "\n".join(
        [
            f"deployment  {deployment.path} ({deployment.flavour}, {deployment.model.precision})",
            f"requests    {len(requests)} ({requests.source}), {lengths.mean():.0f} events on average",
            f"served      {', '.join(served)}",
            f"scenarios   {', '.join(scenarios)}; {plan.repeats} runs of {plan.seconds:g} s each",
            f"bound       {plan.bound.text}",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt bench serve"))
