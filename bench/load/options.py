"""Options of the commands that send load, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hstu_trt.bench.arguments import count, positive, whole
from hstu_trt.bench.load.scenarios import Bound, Plan
from hstu_trt.bench.workloads.generate import DEFAULT_SEED
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import Requests, generate_requests, read_requests
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.served import SERVED, require_served

BOTH = "both"


def add_plan_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Options of commands that send load. without: those that mean nothing to a command, as in ``timeout``."""
    plan = Plan()
    for name, given in _options(plan).items():
        attribute = name.replace("-", "_")
        if attribute in without:
            parser.set_defaults(**{attribute: given.get("default")})
        else:
            parser.add_argument(f"--{name}", **given)


def _options(plan: Plan) -> dict[str, dict[str, Any]]:
    """Name -> how it is read, and what is said of it."""
    return {
        "slo-ms": {"type": positive, "default": plan.bound.ms, "help": "bound on the latency (default: 80)"},
        "percentile": {"type": float, "default": plan.bound.percentile, "help": "that the bound is on (default: 99)"},
        "seconds": {"type": positive, "default": plan.seconds, "help": "per run (default: 10; to quote: 60 or more)"},
        "probe-seconds": {"type": positive, "default": plan.probe_seconds, "help": "server: per probe (default: 5)"},
        "repeats": {"type": count, "default": plan.repeats, "help": "of each run (default: 3)"},
        "offline-in-flight": {"type": count, "default": plan.in_flight, "help": "offline (default: %(default)s)"},
        "single-requests": {
            "type": count, "default": plan.single_requests, "help": "single: requests per run (default: %(default)s)"
        },
        "clients": {"type": count, "default": 1, "help": "client processes (default: 1)"},
        "timeout": {"type": positive, "default": 30.0, "help": "seconds to wait for an answer (default: 30)"},
        "profile": {"choices": PROFILES, "default": "ci", "help": "of the workload (default: ci)"},
        "inputs": {"type": Path, "help": "own requests instead: .npz, a folder of them, or .safetensors"},
        "requests": {"type": count, "default": 256, "help": "different requests, sent in turn (default: 256)"},
        "seed": {"type": whole, "default": DEFAULT_SEED, "help": "of requests and arrivals (default: %(default)s)"},
        "check": {"type": count, "default": 256, "help": "requests held against PyTorch (default: 256)"},
        "reference": {"type": Path, "help": "model folder in fp32 to check against (default: the served one)"},
        "reference-device": {"default": "cpu", "help": "where PyTorch computes (default: cpu)"},
        "commit": {"help": "for the rows, where this is no git checkout"},
        "out": {"type": Path, "help": "rows are added to this file (default: bench/results/serve_*.jsonl)"},
    }  # fmt: skip


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


def reference_of(args: argparse.Namespace, served: ModelFolder) -> ModelFolder:
    """The model that scores are held against: the one that the options name, else the served one."""
    return read_model_folder(args.reference) if args.reference else served
