"""What ``serve`` tells of itself: its plan before a launch, and what it serves once it is ready."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from typing import Any

from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.guard import guard_note
from hstu_trt.serving.served import models_of
from hstu_trt.serving.server import SAFE_HTTP_VERSION, LaunchPlan
from hstu_trt.serving.server_process import ServerProcess
from hstu_trt.serving.starting import Ready
from hstu_trt.serving.tier_report import PlacedTable, tables_json, tables_text


def print_plan(plan: LaunchPlan, placed: list[PlacedTable], *, as_json: bool) -> None:
    """The command line, after the tables as comments, so that a shell takes the whole."""
    if as_json:
        told = {"command": plan.command, "environment": plan.environment, "tables": tables_json(placed)}
        print(json.dumps(told))
        return
    print("".join(f"# {line}\n" for line in tables_text(placed).splitlines()), end="")
    variables = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    print(" \\\n  ".join([*variables, *map(shlex.quote, plan.command)]))


def facts_of(deployment: Deployment, process: ServerProcess, ready: Ready) -> dict[str, Any]:
    """Of a server that is ready, for ``--json`` and events."""
    model = deployment.model
    return {
        "url": process.plan.url,
        "metrics": process.plan.metrics_url,
        "pid": process.pid,
        "served": list(deployment.served),
        "models": list(models_of(deployment.served)),
        "model": model.name,
        "precision": model.precision,
        "flavour": deployment.flavour,
        "attention_norm": deployment.attention_norm,
        "limits": dataclasses.asdict(model.limits),
        "log": str(process.plan.log),
        **dataclasses.asdict(ready),
    }


def banner(deployment: Deployment, plan: LaunchPlan, ready: Ready) -> str:
    """The same for people."""
    model, limits = deployment.model, deployment.model.limits
    lines = [
        f"ready after {ready.seconds:.1f} s: tritonserver {ready.version}, {model.name} {model.precision}",
        f"  gRPC    {plan.url}   (HTTP, model control and shared memory are closed)",
        f"  metrics {plan.metrics_url or 'closed: --metrics-port opens them'}",
        f"  models  {', '.join(models_of(deployment.served))}",
        f"  limits  {limits.users} users, {limits.history} events and {limits.candidates} candidates per user",
        f"  norm    {deployment.attention_norm}; ids outside a table: {deployment.id_policy}",
        *([f"  refresh follows {deployment.versions.resolve()}"] if deployment.versions.exists() else []),
        f"  check   {_check_text(deployment, ready)}",
        *_version_warning(ready.version),
        *guard_note(plan.environment),
        "try it:",
        f"  {shlex.quote(sys.executable)} -m hstu_trt.serving.client --url {plan.url}",
        "stop with Ctrl-C",
    ]
    return "\n".join(lines)


def _check_text(deployment: Deployment, ready: Ready) -> str:
    if len(deployment.served) == 1:
        (name,) = deployment.served
        if ready.canary_difference is None:
            return f"{name} answers, from tables that cannot be read here, so that its scores are compared with none"
        return f"{name} agrees with ONNX Runtime within {ready.canary_difference:.1g} on a sample request"
    both = " and ".join(deployment.served)
    if ready.canary_difference is None:
        return f"{both} answer, from different tables, so that their scores are not compared"
    return f"{both} agree within {ready.canary_difference:.1g} on a sample request"


def _version_warning(version: str) -> list[str]:
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers >= SAFE_HTTP_VERSION:
        return []
    floor = ".".join(map(str, SAFE_HTTP_VERSION))
    return [
        f"  note    tritonserver below {floor} can be killed by a crafted HTTP request: keep HTTP closed, as it is now"
    ]
