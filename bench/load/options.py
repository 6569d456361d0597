"""Options of the commands that send load, and what they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

from hstu_trt.bench.load.scenarios import Bound, Plan
from hstu_trt.bench.workloads.generate import DEFAULT_SEED
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import Requests, generate_requests, read_requests
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.served import SERVED, require_served

BOTH = "both"


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command that sends load has."""
    plan = Plan()
    parser.add_argument("--slo-ms", type=float, default=plan.bound.ms, help="bound on the latency (default: 80)")
    parser.add_argument("--percentile", type=float, default=99.0, help="that the bound is on (default: 99)")
    parser.add_argument(
        "--seconds", type=float, default=plan.seconds, help="per run (default: 10; to quote: 60 or more)"
    )
    parser.add_argument(
        "--probe-seconds", type=float, default=plan.probe_seconds, help="server: per probe (default: 5)"
    )
    parser.add_argument("--repeats", type=int, default=plan.repeats, help="of each run (default: 3)")
    parser.add_argument("--offline-in-flight", type=int, default=plan.in_flight, help=f"(default: {plan.in_flight})")
    parser.add_argument("--single-requests", type=int, default=plan.single_requests, help="(default: 500)")
    parser.add_argument("--clients", type=int, default=1, help="client processes (default: 1)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for an answer (default: 30)")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="of the workload (default: ci)")
    parser.add_argument("--inputs", type=Path, help="own requests instead: .npz, a folder of them, or .safetensors")
    parser.add_argument("--requests", type=int, default=256, help="different requests, sent in turn (default: 256)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--check", type=int, default=256, help="requests held against PyTorch (default: 256)")
    parser.add_argument(
        "--reference", type=Path, help="model folder in fp32 to check against (default: the served one)"
    )
    parser.add_argument("--reference-device", default="cpu", help="where PyTorch computes (default: cpu)")
    parser.add_argument("--commit", help="for the rows, where this is no git checkout")
    parser.add_argument("--out", type=Path, help="rows are added to this file (default: bench/results/serve_*.jsonl)")


def add_served_option(parser: argparse.ArgumentParser) -> None:
    """Which of the served models get load."""
    parser.add_argument("--served", choices=(BOTH, *SERVED), help="(default: all that the deployment serves)")


def served_of(args: argparse.Namespace, deployment: Deployment) -> tuple[str, ...]:
    """The models that get load. Raises ConfigError for one that the deployment does not serve."""
    asked = {None: deployment.served, BOTH: SERVED}.get(args.served, (args.served,))
    for model in asked:
        require_served(model, deployment.served, str(deployment.path))
    return asked


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the options ask for. Raises ConfigError."""
    return Plan(
        seconds=args.seconds,
        probe_seconds=args.probe_seconds,
        repeats=args.repeats,
        bound=Bound(ms=args.slo_ms, percentile=args.percentile),
        in_flight=args.offline_in_flight,
        single_requests=args.single_requests,
        seed=args.seed,
    )


def requests_of(args: argparse.Namespace, model: ModelFolder) -> Requests:
    """The requests that the options ask for."""
    if args.inputs is not None:
        return read_requests(args.inputs, model.ranking_config)
    return generate_requests(model, profile=args.profile, count=args.requests, seed=args.seed)
