"""``hstu-trt serve``: checks a deployment, launches tritonserver, proves that it answers, drains it on a signal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.serving import lint
from hstu_trt.serving.banner import banner, facts_of, print_plan
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.engine_steps import check_engines
from hstu_trt.serving.operating import Reporter, add_options, exposure, in_run_folder, trace_flags
from hstu_trt.serving.server import (
    LOOPBACK,
    LaunchPlan,
    Listen,
    Tritonserver,
    find_tritonserver,
    plan_launch,
    tensorrt_flags,
)
from hstu_trt.serving.server_process import ServerProcess
from hstu_trt.serving.starting import POLL_S, READY_TIMEOUT_S, check, start, start_error
from hstu_trt.serving.stopping import Stopped, heed_stop, raise_if_stopped, stop_on_signals, uninterrupted
from hstu_trt.serving.supervision.drain import wait_until_quiet
from hstu_trt.serving.supervision.supervisor import Event, Supervisor, supervisor_of
from hstu_trt.serving.tier_report import placed_tables
from hstu_trt.serving.tls import add_server_options, server_tls
from hstu_trt.serving.trusted_files import check_plugins


def wait_for_end(process: ServerProcess) -> None:
    """Returns never: ends by Stopped from a signal, or by StartError when the server dies."""
    while process.exit_code is None:
        raise_if_stopped()
        time.sleep(POLL_S)
    process.bury()
    raise start_error(f"tritonserver died with code {process.exit_code}", process.plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt serve", description="Launch Triton on a deployment.")
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--check", action="store_true", help="verify every file, the tables too, lint, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print tables, their memory and the server's command line"
    )
    parser.add_argument("--json", action="store_true", help="print what is served as one JSON line")
    parser.add_argument("--tritonserver", type=Path, help="binary (default: NGC install, else nvidia-pytriton wheel)")
    parser.add_argument(
        "--plugins",
        type=Path,
        help="flavour tensorrt: the plugins' autoload library (in build/lib)",
    )
    parser.add_argument("--address", default=LOOPBACK, help=f"address to listen on (default: {LOOPBACK})")
    parser.add_argument("--grpc-port", type=int, help="gRPC port (default: 8001 if free; 0: any free one)")
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on this port (default: closed)")
    parser.add_argument("--ready-timeout", type=float, default=READY_TIMEOUT_S, help="seconds to wait for the models")
    parser.add_argument(
        "--restart",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="restart the server when a process of it dies, hangs, or answers wrong (default: --restart)",
    )
    add_server_options(parser)
    add_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """The ``serve`` verb."""
    args = _parser().parse_args(argv)
    deployment = in_run_folder(read_deployment(args.deployment), args.run)
    check(deployment, hash_tables=args.check, connect=not args.dry_run)
    if args.check:
        text = f"{args.deployment}: files and tables verified, {len(lint.RULES)} rules kept"
        print(json.dumps({"ok": True}) if args.json else text)
        return 0
    server = find_tritonserver(args.tritonserver)
    listen = Listen(
        address=args.address, grpc_port=args.grpc_port, metrics_port=args.metrics_port, tls=server_tls(args)
    )
    flags: tuple[str, ...] = ()
    if deployment.flavour == "tensorrt":
        flags = tensorrt_flags(server, args.plugins)
        check_plugins(deployment, args.plugins)
    flags += trace_flags(args.trace_otlp, args.trace_rate)
    plan = plan_launch(server, deployment, listen, flags)
    if args.dry_run:
        print_plan(plan, placed_tables(deployment), as_json=args.json)
        return 0
    if deployment.flavour == "tensorrt":
        check_engines(deployment)
    reporter = Reporter(deployment.run, args.log_format, only_own=args.json)
    if warning := exposure(listen):
        reporter.warn(warning)
    try:
        return _serve(deployment, server, plan, args, reporter)
    except HstuTrtError as error:
        reporter.event("failed", message=str(error))
        raise
    finally:
        reporter.close()


def _serve(
    deployment: Deployment, server: Tritonserver, plan: LaunchPlan, args: argparse.Namespace, reporter: Reporter
) -> int:
    process = supervisor = None
    stop_on_signals()
    try:
        reporter.event("starting", log=str(plan.log))
        if not args.json:
            reporter.text(f"starting tritonserver ({server.origin}), log: {plan.log}")
        process, ready = start(deployment, plan, args.ready_timeout)
        facts = facts_of(deployment, process, ready)
        reporter.event("ready", server=facts)
        reporter.text(json.dumps(facts) if args.json else banner(deployment, plan, ready))
        if args.restart:
            with uninterrupted():
                supervisor = _supervise(deployment, plan, process, args, reporter)
            supervisor.run()
        wait_for_end(process)
    except Stopped:
        heed_stop()
        reporter.event("draining")
        process = process if supervisor is None else supervisor.process
        if process is not None:
            wait_until_quiet(plan.url, plan.tls)
            process.drain()
        reporter.event("stopped")
        if not args.json:
            reporter.text("drained and stopped")
    finally:
        if supervisor is not None:
            supervisor.close()
    return 0


def _supervise(
    deployment: Deployment, plan: LaunchPlan, process: ServerProcess, args: argparse.Namespace, reporter: Reporter
) -> Supervisor:
    """A supervisor of a server that runs; it checks every file anew before each restart."""

    def launch() -> ServerProcess:
        again = in_run_folder(read_deployment(args.deployment), args.run)
        check(again)
        return start(again, plan, args.ready_timeout)[0]

    def tell(event: Event) -> None:
        reporter.event(
            event.event, **{name: fact for name, fact in event.to_json().items() if name not in ("event", "at")}
        )
        reporter.text(json.dumps(event.to_json()) if args.json else str(event))

    return supervisor_of(deployment, process, launch, tell)


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt serve"))
