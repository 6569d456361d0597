"""``hstu-trt fleet``: replicas behind a gateway, and commands to them while they run."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.text import text_table
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.fleet import release as fleet_release
from hstu_trt.serving.fleet.control import ask, listen, take_run_folder
from hstu_trt.serving.fleet.fleet import RECORD, Fleet, ReplicaSettings, Tell
from hstu_trt.serving.fleet.gateway import Gateway, find_nginx
from hstu_trt.serving.fleet.gateway_config import GatewaySettings, largest_request
from hstu_trt.serving.fleet.release import Golden
from hstu_trt.serving.operating import exposure
from hstu_trt.serving.server import DEFAULT_GRPC_PORT, LOOPBACK, Listen, choose_port
from hstu_trt.serving.tls import add_server_options, server_tls

DEFAULT_RUN = Path("build/fleet")
FIRST_REPLICA_PORT = 18001
STATUS_TIMEOUT_S = 30.0
"""The status is always at hand: a fleet that does not tell it hangs."""
COMMANDS = ("status", "add", "drain", "replace")


def main(argv: Sequence[str]) -> int:
    """The ``fleet`` verb: starts a fleet, or sends a command to a running one."""
    if argv and argv[0] in COMMANDS:
        return _command(argv)
    args = _parser().parse_args(argv)
    if args.replicas is not None and args.replicas < 1:
        raise ConfigError(f"--replicas {args.replicas}: at least one is needed")
    tls = server_tls(args, asks_itself=False)
    if warning := exposure(Listen(address=args.address, tls=tls)):
        print(warning, file=sys.stderr, flush=True)
    run = args.run.resolve()
    lock = take_run_folder(run)
    try:
        deployment = _what_to_serve(args.deployment, run)
        model = read_deployment(deployment, verify=False).model
        settings = GatewaySettings(
            address=args.address,
            port=choose_port(args.address, args.port),
            tls=tls,
            max_body=args.max_body if args.max_body is not None else largest_request(model),
        )
        gateway = Gateway(find_nginx(args.nginx), run / "gateway", settings)
        replicas = ReplicaSettings(
            count=args.replicas or max(1, len(args.gpus)), gpus=args.gpus, first_port=args.first_replica_port,
            options=tuple(args.serve_options),
        )  # fmt: skip
        tell = partial(_tell, args.json)
        asyncio.run(_run(Fleet(run, gateway, replicas, tell), deployment, run, tell))
    finally:
        lock.close()
    return 0


async def _run(fleet: Fleet, deployment: Path, run: Path, tell: Tell) -> None:
    """Serves until a signal comes."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(fleet.start(deployment))
    tasks = [stopping]
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            server = await listen(run, partial(_handle, fleet))
            tasks.append(asyncio.create_task(fleet.watch()))
            status = fleet.status()
            tell(f"ready: {len(status['gets_requests'])} replicas behind {status['url']}, commands in {run}")
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            server.close()
            if not stopping.done():
                await tasks[1]  # what ended the watch
    finally:
        for task in (starting, *tasks):
            task.cancel()
        await asyncio.gather(starting, *tasks, return_exceptions=True)
        await fleet.stop()
    tell("drained and stopped")


async def _handle(fleet: Fleet, command: dict[str, Any], tell: Tell) -> Any:
    """Carries out a command that came over the socket."""
    result: Any = None
    match command:
        case {"do": "status"}:
            result = fleet.status()
        case {"do": "add"}:
            result = await fleet.add(tell)
        case {"do": "drain", "name": str(name)}:
            await fleet.drain(name, tell)
        case {"do": "replace", "name": str(name)}:
            result = await fleet.replace(name, tell)
        case {"do": "release", "deployment": str(deployment), "golden": golden}:
            files = Golden(requests=Path(golden[0]), expected=Path(golden[1])) if golden else None
            await fleet_release.release(fleet, Path(deployment), files, tell, command.get("drop", ()))
        case {"do": "rollback"}:
            await fleet_release.rollback(fleet, tell)
        case {"do": "retire"}:
            await fleet_release.retire(fleet, tell)
        case _:
            raise ConfigError(f"no such command: {json.dumps(command)}")
    return result


def _tell(as_json: bool, text: str) -> None:
    print(json.dumps({"at": round(time.time(), 3), "say": text}) if as_json else text, flush=True)


def _what_to_serve(given: Path | None, run: Path) -> Path:
    """The given deployment, or the one that the fleet of this folder served last. Raises ConfigError.

    A fleet that is started again after a release must not fall back to the deployment before it unasked.
    """
    record = run / RECORD
    served = Path(json.loads(record.read_text())["current"]) if record.exists() else None
    wanted = served if given is None else given.resolve()
    if wanted is None:
        raise ConfigError("--deployment is missing: the folder to serve, made by hstu-trt assemble")
    if served not in (None, wanted):
        raise ConfigError(
            f"the fleet in {run} served {served} last, by a release; leave --deployment out to go on with that, "
            f"or remove {record} to serve {given}"
        )
    return wanted


def _command(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"hstu-trt fleet {argv[0]}")
    parser.add_argument("do", choices=COMMANDS)
    if argv[0] in ("drain", "replace"):
        parser.add_argument("name", help="of the replica, as status tells")
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN, help=f"folder of the fleet (default: {DEFAULT_RUN})")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args(argv)
    command = {"do": args.do, **({"name": args.name} if "name" in args else {})}
    timeout_s = STATUS_TIMEOUT_S if args.do == "status" else None
    result = ask(args.run.resolve(), command, partial(print, file=sys.stderr, flush=True), timeout_s)
    if args.json:
        print(json.dumps(result))
    elif args.do == "status":
        print(_status_text(result))
    return 0


def _status_text(status: dict[str, Any]) -> str:
    rows = [
        (which, replica["name"], replica["address"], replica["gpu"] or "-", replica["state"],
         "yes" if replica["address"] in status["gets_requests"] else "no", replica["restarts"],
         replica["metrics"] or "closed", replica["last"])
        for which in ("current", "previous")
        for replica in (status[which] or {"replicas": []})["replicas"]
    ]  # fmt: skip
    table = text_table(
        ("generation", "replica", "address", "gpu", "state", "requests", "restarts", "metrics", "last canary"), rows
    )
    served = [f"{which}: {status[which]['deployment']}" for which in ("current", "previous") if status[which]]
    return "\n".join([f"gateway: {status['url']}", *served, table])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hstu-trt fleet",
        description="Serve a deployment with several replicas behind nginx. Commands to a running fleet: "
        f"hstu-trt fleet {'|'.join(COMMANDS)}; new deployments: hstu-trt release.",
    )
    parser.add_argument(
        "--deployment", type=Path, help="folder made by hstu-trt assemble (default: the last one served)"
    )
    parser.add_argument("--replicas", type=int, help="how many (default: one per GPU of --gpus, else one)")
    parser.add_argument("--gpus", type=_names, default=(), help="e.g. 0,1: replicas take one each, in turn")
    parser.add_argument("--address", default=LOOPBACK, help=f"address of the gateway (default: {LOOPBACK})")
    parser.add_argument(
        "--port", "--grpc-port", type=int, default=DEFAULT_GRPC_PORT, help=f"its gRPC port ({DEFAULT_GRPC_PORT})"
    )
    parser.add_argument(
        "--first-replica-port", type=int, default=FIRST_REPLICA_PORT,
        help=f"replicas take the first free ones from here on ({FIRST_REPLICA_PORT})",
    )  # fmt: skip
    parser.add_argument("--max-body", type=int, help="bytes of a request (default: what the model's limits allow)")
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN, help=f"folder for its files (default: {DEFAULT_RUN})")
    parser.add_argument("--nginx", type=Path, help="program (default: what `make nginx` unpacked, else on PATH)")
    add_server_options(parser)
    parser.add_argument("--json", action="store_true", help="print what happens as JSON lines")
    parser.add_argument("serve_options", nargs="*", metavar="-- OPTIONS", help="further options of hstu-trt serve")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt fleet"))
