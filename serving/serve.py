"""``hstu-trt serve``: checks a deployment, launches tritonserver, proves that it answers, drains it on a signal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import GateError, HstuTrtError
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving import lint
from hstu_trt.serving.client import Answer, RankingClient, ServerError
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.engine_steps import check_engines
from hstu_trt.serving.guard import guard_note
from hstu_trt.serving.operating import Reporter, add_options, exposure, hide_key, in_run_folder, trace_flags
from hstu_trt.serving.refresh.releases import ReleaseFolder, check_published
from hstu_trt.serving.refresh.settings import takes_previous
from hstu_trt.serving.requests import sample
from hstu_trt.serving.server import (
    LOOPBACK,
    SAFE_HTTP_VERSION,
    LaunchPlan,
    Listen,
    ServerProcess,
    Tritonserver,
    find_tritonserver,
    plan_launch,
    tensorrt_flags,
)
from hstu_trt.serving.signature import MODELS
from hstu_trt.serving.supervision.drain import wait_until_quiet
from hstu_trt.serving.supervision.failure import cause_of_failure
from hstu_trt.serving.supervision.supervisor import Event, Supervisor, supervisor_of
from hstu_trt.serving.tier_report import PlacedTable, check_tiers, placed_tables, tables_json, tables_text
from hstu_trt.serving.tls import ClientTls, add_server_options, connect, server_tls
from hstu_trt.serving.trusted_files import check_plugins

READY_TIMEOUT_S = 120.0
_POLL_S = 0.1
_CANARY_TURNS, _CANARY_PAUSE_S = 4, 0.5


class StartError(HstuTrtError):
    """The server did not become ready, or died."""

    exit_code = 1


class Stopped(Exception):  # noqa: N818 - a request from outside, not an error
    """A signal asked us to stop."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a ready server reported."""

    version: str
    seconds: float
    """From launch to the canary's answer."""
    canary_difference: float | None
    """Largest difference of the canary's scores between the ensemble and the fused model; None: of other tables."""


def check(deployment: Deployment, *, hash_tables: bool = False, connect: bool = True) -> None:
    """What can be known before a launch; hashing the tables reads them whole, so only ``--check`` does.

    connect: also asks the clusters of remote tables. Raises ArtefactError, ConfigError for more memory than there is,
    RemoteError, or GateError that lists the findings of the lint.
    """
    check_tiers(deployment, hash_tables=hash_tables, connect=connect)
    folder = ReleaseFolder(deployment.versions, deployment.model, takes_previous(deployment.bad_version))
    check_published(folder, tell=lambda text: print(f"warning: {text}", file=sys.stderr))
    lint.require_clean(deployment.repository, deployment.model, deployment.flavour)


def start(deployment: Deployment, plan: LaunchPlan, timeout_s: float = READY_TIMEOUT_S) -> tuple[ServerProcess, Ready]:
    """Launches the server and waits until every model answers. Raises StartError with the cause from the log."""
    began = time.monotonic()
    process = ServerProcess(plan)
    try:
        version = _wait_until_ready(process, timeout_s)
        hide_key(process.pid, plan)
        difference = _canary(deployment, plan.url, plan.tls)
    except BaseException as error:
        process.drain(timeout_s=5)
        if isinstance(error, ServerError):
            raise _start_error("the server did not answer the first request", plan, str(error)) from None
        raise
    return process, Ready(version=version, seconds=time.monotonic() - began, canary_difference=difference)


def _wait_until_ready(process: ServerProcess, timeout_s: float) -> str:
    """Returns the server's version once every model is ready."""
    client = connect(process.plan.url, process.plan.tls)
    waiting, deadline = list(MODELS), time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            if process.exit_code is not None:
                raise _start_error(f"tritonserver exited with code {process.exit_code} while starting", process.plan)
            waiting = [name for name in waiting if not _is_ready(client, name)]
            if not waiting:
                return str(client.get_server_metadata().version)
            time.sleep(_POLL_S)
    finally:
        client.close()
    raise _start_error(f"models not ready after {timeout_s:g} s: {', '.join(waiting)}", process.plan)


def _is_ready(client: Any, model: str) -> bool:
    try:
        return bool(client.is_model_ready(model, client_timeout=5))
    except InferenceServerException:
        return False


def _start_error(what: str, plan: LaunchPlan, *details: str) -> StartError:
    lines = [what, *details, *cause_of_failure(plan.log)]
    return StartError("\n  ".join(lines) + f"\n  full log: {plan.log}")


def _canary(deployment: Deployment, url: str, tls: ClientTls | None = None) -> float | None:
    """A made-up request through both models; Triton calls a model ready that cannot answer one.

    None where they serve different tables: for good if the fused model is an engine with tables of its own and others
    have been published, for a moment while one takes what the other has.
    """
    model = deployment.model
    request = sample(model.ranking_config, model.limits)
    for turn in range(_CANARY_TURNS):
        if turn:
            time.sleep(_CANARY_PAUSE_S)
        answers = []
        for name in (ENSEMBLE, FUSED):
            with RankingClient(url, name, tls=tls) as client:
                answers.append(client.ask(request))
        if answers[0].tables_digest == answers[1].tables_digest:
            return _difference(answers[0], answers[1], TOLERANCES[ENSEMBLE, model.tolerances].atol)
    return None


def _difference(ensemble: Answer, fused: Answer, allowed: float) -> float:
    difference = float(np.abs(ensemble.scores - fused.scores).max())
    if not difference <= allowed:
        raise GateError(
            f"{ENSEMBLE} and {FUSED} disagree by {difference:.2g} on a sample request; {allowed:g} is allowed"
        )
    return difference


def wait_for_end(process: ServerProcess) -> None:
    """Returns never: ends by Stopped from a signal, or by StartError when the server dies."""
    while process.exit_code is None:
        time.sleep(_POLL_S)
    process.kill_stubs()
    raise _start_error(f"tritonserver died with code {process.exit_code}", process.plan)


def _stop_on_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


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
        _print_plan(plan, placed_tables(deployment), as_json=args.json)
        return 0
    if deployment.flavour == "tensorrt":
        check_engines(deployment)
    reporter = Reporter(deployment.run, args.log_format)
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
    _stop_on_signals()
    try:
        reporter.event("starting", log=str(plan.log))
        if not args.json:
            reporter.text(f"starting tritonserver ({server.origin}), log: {plan.log}")
        process, ready = start(deployment, plan, args.ready_timeout)
        facts = _facts(deployment, process, ready)
        reporter.event("ready", server=facts)
        reporter.text(json.dumps(facts) if args.json else _banner(deployment, plan, ready))
        if args.restart:
            supervisor = _supervise(deployment, plan, process, args, reporter)
            supervisor.run()
        wait_for_end(process)
    except Stopped:
        reporter.event("draining")
        process = process if supervisor is None else supervisor.process
        if process is not None:
            wait_until_quiet(plan.url, plan.tls)
            process.drain()
        reporter.event("stopped")
        if not args.json:
            reporter.text("drained and stopped")
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


def _print_plan(plan: LaunchPlan, placed: list[PlacedTable], *, as_json: bool) -> None:
    """The command line, after the tables as comments, so that a shell takes the whole."""
    if as_json:
        told = {"command": plan.command, "environment": plan.environment, "tables": tables_json(placed)}
        print(json.dumps(told))
        return
    print("".join(f"# {line}\n" for line in tables_text(placed).splitlines()), end="")
    variables = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    print(" \\\n  ".join([*variables, *map(shlex.quote, plan.command)]))


def _facts(deployment: Deployment, process: ServerProcess, ready: Ready) -> dict[str, Any]:
    model = deployment.model
    return {
        "url": process.plan.url,
        "pid": process.pid,
        "models": list(MODELS),
        "model": model.name,
        "precision": model.precision,
        "flavour": deployment.flavour,
        "attention_norm": deployment.attention_norm,
        "limits": dataclasses.asdict(model.limits),
        "log": str(process.plan.log),
        **dataclasses.asdict(ready),
    }


def _banner(deployment: Deployment, plan: LaunchPlan, ready: Ready) -> str:
    model, limits = deployment.model, deployment.model.limits
    lines = [
        f"ready after {ready.seconds:.1f} s: tritonserver {ready.version}, {model.name} {model.precision}",
        f"  gRPC    {plan.url}   (HTTP, model control and shared memory are closed)",
        f"  models  {', '.join(MODELS)}",
        f"  limits  {limits.users} users, {limits.history} events and {limits.candidates} candidates per user",
        f"  norm    {deployment.attention_norm}; ids outside a table: {deployment.id_policy}",
        *([f"  refresh follows {deployment.versions.resolve()}"] if deployment.versions.exists() else []),
        f"  check   {_check_text(ready)}",
        *_version_warning(ready.version),
        *guard_note(plan.environment),
        "try it:",
        f"  {shlex.quote(sys.executable)} -m hstu_trt.serving.client --url {plan.url}",
        "stop with Ctrl-C",
    ]
    return "\n".join(lines)


def _check_text(ready: Ready) -> str:
    if ready.canary_difference is None:
        return f"{ENSEMBLE} and {FUSED} answer, from different tables, so that their scores are not compared"
    return f"{ENSEMBLE} and {FUSED} agree within {ready.canary_difference:.1g} on a sample request"


def _version_warning(version: str) -> list[str]:
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers >= SAFE_HTTP_VERSION:
        return []
    floor = ".".join(map(str, SAFE_HTTP_VERSION))
    return [
        f"  note    tritonserver below {floor} can be killed by a crafted HTTP request: keep HTTP closed, as it is now"
    ]


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt serve"))
