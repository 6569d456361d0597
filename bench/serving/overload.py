"""``hstu-trt bench overload``: a deployment under more load than it can serve.

Measures the peak of a served model, then its latency at a rate that it can serve (a share of the peak), a burst at
``--factor`` times the peak followed at once by that rate again, and many connections at once. Exit code 1 if a promise
is missed: refused requests are refused at once, accepted ones take at most twice as long as without the burst, nothing
else fails, throughput stays, memory does not grow, all is normal soon after it, and no connection is left behind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hstu_trt.bench.load.client import ClosedLoop, OpenLoop, poisson
from hstu_trt.bench.load.cpus import Cpus, cpu_set, pin
from hstu_trt.bench.load.machine_watch import MachineWatch
from hstu_trt.bench.load.options import served_of
from hstu_trt.bench.load.process_tree import family
from hstu_trt.bench.load.process_watch import UsageWatch, usage
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.provenance import device_here, provenance_here
from hstu_trt.bench.load.stats import SHED, LoadResult, summarise
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.load.workbench import running
from hstu_trt.bench.result_rows import Provenance, ResultRow, append_rows
from hstu_trt.bench.serving.overload_load import (
    Connections,
    Split,
    answers_per_s,
    ask_over_connections,
    burst_schedule,
    recovery_s,
    split,
)
from hstu_trt.bench.serving.overload_settings import Promises, Setting, parser_of
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.text import text_table
from hstu_trt.serving.deployment import Deployment, read_deployment

SUITE = "overload"
GATE_EXIT_CODE = 1
_SETTLE_S = 1.0
"""After the connections are closed, until handles are counted."""
_HANDLE_SLACK = 20
"""Of so many thousands of handles that came and went; gRPC keeps some threads and pollers that it made."""


_SHED_SLACK = 0.05
"""Of the requests of a second, which are few."""


@dataclass(frozen=True, kw_only=True)
class Overload:
    """What a served model did."""

    served: str
    peak_per_s: float
    normal_ms: dict[str, float]
    normal_shed: float
    """Share of the requests."""
    burst: Split
    client_cores: float
    """CPU cores that our client took during the burst, of those that the server might have used."""
    accepted_per_s: float
    recovered_s: float
    memory_growth: float
    connections: Connections
    handles_left: int
    machine: dict[str, Any]
    flags: tuple[str, ...] = ()
    """Why the normal run, whose p99 the burst's is held against, should not be believed; what it shed is a figure."""

    def figures(self) -> dict[str, float]:
        """Name -> figure, as rows and people see them."""
        refused, accepted = self.burst.refused_ms, self.burst.accepted_ms
        p99 = _percentile(accepted, 99)
        return {
            "peak_per_s": self.peak_per_s,
            "normal_p50_ms": self.normal_ms["p50"],
            "normal_p99_ms": self.normal_ms["p99"],
            "normal_shed": self.normal_shed,
            "accepted": float(len(accepted)),
            "accepted_per_s": self.accepted_per_s,
            "throughput_share": self.accepted_per_s / self.peak_per_s,
            "accepted_p99_ms": p99,
            "latency_ratio": p99 / self.normal_ms["p99"],
            "refused": float(len(refused)),
            "refusal_p50_ms": _percentile(refused, 50),
            "refusal_p99_ms": _percentile(refused, 99),
            "client_cores": self.client_cores,
            "failed": float(sum(self.burst.failed.values()) + sum(self.connections.failed.values())),
            "memory_growth": self.memory_growth,
            "recovery_s": self.recovered_s,
            "connections": float(self.connections.asked),
            "connections_answered": float(self.connections.answered),
            "connections_shed": float(self.connections.shed),
            "connections_s": self.connections.seconds,
            "handles_left": float(self.handles_left),
        }

    def missed(self, promises: Promises) -> list[str]:
        """A sentence for each promise that was not kept."""
        figures = self.figures()
        found = [
            f"{name} is {figures[name]:.4g}, {most:g} is allowed"
            for name, most in {
                "refusal_p99_ms": promises.refusal_p99_ms,
                "latency_ratio": promises.latency_ratio,
                "normal_shed": promises.normal_shed,
                "memory_growth": promises.memory_growth,
                "recovery_s": promises.recovery_s,
                "handles_left": _HANDLE_SLACK,
            }.items()
            if not figures[name] <= most
        ]
        if not figures["throughput_share"] >= promises.throughput_share:
            found.append(f"throughput_share is {figures['throughput_share']:.3f}, {promises.throughput_share:g} is due")
        if not figures["refused"]:
            found.append("nothing was refused: this was no overload")
        if figures["failed"]:
            found.append(f"requests failed otherwise: {self.burst.failed | self.connections.failed}")
        return found


def _percentile(values: Any, percentile: float) -> float:
    return float(np.percentile(values, percentile)) if len(values) else 0.0


def _part(server: int, cpus: Cpus) -> None:
    """Gives the server and us cores of our own; the clients, which are children of ours, are not there yet."""
    for processes, chosen in ((family(server), cpus.server), ([os.getpid()], cpus.client)):
        if chosen is not None:
            pin(processes, chosen)


def answered(result: LoadResult, served: str) -> LoadResult:
    """The result, which later parts of the run build on. Raises HstuTrtError if no request was answered."""
    if not result.latency_ms:
        reason = "; ".join(result.errors) or "all were refused"
        raise HstuTrtError(f"{served} answered none of {result.requests} requests before the overload: {reason}")
    return result


def overload_run(url: str, pid: int, served: str, requests: Sequence[Tensors], setting: Setting) -> Overload:
    """All parts of a run on one served model of a running server.

    pid: of the process whose descendants are the server and its models.
    """
    address = TritonAddress(url=url, model=served, timeout_s=setting.timeout_s)
    with Clients(address, requests, processes=setting.clients) as clients, MachineWatch() as machine:
        clients.run(ClosedLoop(in_flight=4, requests=30))
        peak = answered(
            summarise(clients.run(ClosedLoop(in_flight=setting.in_flight, seconds=setting.seconds))), served
        )
        rate = setting.share * peak.per_s
        calm = OpenLoop(offsets_s=poisson(rate, setting.seconds, setting.seed), most_waiting=1 << 30)
        normal = answered(summarise(clients.run(calm), requested_per_s=rate), served)
        normal_shed = normal.shed / normal.requests
        before = usage(pid).memory_bytes
        loop = burst_schedule(
            normal=rate, burst=setting.factor * peak.per_s, seconds=setting.seconds, after_s=setting.after_s,
            seed=setting.seed + 1,
        )  # fmt: skip
        with UsageWatch(pid) as watch:
            records = clients.run(loop)
        handles = usage(pid).handles
        connections = ask_over_connections(url, clients.prepared, setting.connections, setting.timeout_s)
        time.sleep(_SETTLE_S)
        left = usage(pid).handles - handles
    most = max(seen.memory_bytes for _, seen in watch.seen)
    return Overload(
        served=served,
        peak_per_s=peak.per_s,
        normal_ms=dict(normal.latency_ms),
        normal_shed=normal_shed,
        burst=split(records, 0.0, setting.seconds),
        client_cores=records.cpu_s / (setting.seconds + setting.after_s),
        # The first moments fill the queue, and what waits at the end is answered afterwards.
        accepted_per_s=answers_per_s(records, 0.0, setting.seconds),
        recovered_s=recovery_s(records, setting.seconds, normal.latency_ms["p99"], normal_shed + _SHED_SLACK),
        memory_growth=most / before - 1.0,
        connections=connections,
        handles_left=max(0, left),
        machine=machine.facts(),
        flags=tuple(flag for flag in normal.flags if flag != SHED),
    )


def row_of(found: Overload, case: str, setting: Setting, provenance: Provenance, missed: Sequence[str]) -> ResultRow:
    """A run as a row of suite ``overload``: the latency and rate of the accepted requests."""
    accepted = found.burst.accepted_ms
    p25, p50, p75 = (_percentile(accepted, p) for p in (25, 50, 75))
    return ResultRow(
        **vars(provenance), suite=SUITE, case=case, variant=f"{found.served} at {setting.factor:g} x peak",
        median_us=1e3 * p50, spread=(p75 - p25) / p50 if p50 else 0.0, per_s=found.accepted_per_s,
        checks={name: round(value, 4) for name, value in found.figures().items() if np.isfinite(value)},
        details={
            "setting": asdict(setting), "missed": list(missed), "flags": list(found.flags), "machine": found.machine,
        },
    )  # fmt: skip


def _case(deployment: Deployment, source: str) -> str:
    model = deployment.model
    return f"{model.name} {model.precision} {deployment.kind_text}, {source}"


def text(rows: Sequence[ResultRow]) -> str:
    """Rows for people: a figure per line, a column per served model."""
    names = dict.fromkeys(name for row in rows for name in row.checks)
    lines = [(name, *(f"{row.checks[name]:.4g}" if name in row.checks else "" for row in rows)) for name in names]
    return text_table(("figure", *(row.variant for row in rows)), lines)


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = parser_of(__doc__).parse_args(argv)
    cpus = Cpus(server=cpu_set(args.server_cpus), client=cpu_set(args.client_cpus))
    setting = Setting(
        factor=args.factor, share=args.share, seconds=args.seconds, in_flight=args.in_flight,
        connections=args.connections, clients=args.clients, server_cpus=args.server_cpus, client_cpus=args.client_cpus,
    )  # fmt: skip
    if (args.url is None) != (args.server_pid is None):
        raise ConfigError("--url and --server-pid go together")
    promises = Promises(refusal_p99_ms=args.refusal_ms)
    deployment = read_deployment(args.deployment)
    models = served_of(args, deployment)
    source = generate_requests(deployment.model, profile=args.profile, count=64, seed=setting.seed)
    requests = [source.pack([row]) for row in range(len(source))]
    provenance = provenance_here(args.commit)
    rows, failures = [], []
    with running(deployment, args.url) as (url, _, started):
        pid = args.server_pid if started is None else started
        assert pid is not None
        _part(pid, cpus)
        for served in models:
            found = overload_run(url, pid, served, requests, setting)
            missed = found.missed(promises)
            failures += [f"{served}: {sentence}" for sentence in missed]
            rows.append(row_of(found, _case(deployment, source.source), setting, provenance, missed))
    append_rows(args.out, rows)
    print("[" + ",\n ".join(row.to_json() for row in rows) + "]" if args.json else text(rows))
    print(f"{len(rows)} rows added to {args.out}, device {device_here()}", file=sys.stderr)
    for row in rows:
        if row.details["flags"]:
            print(f"{row.variant}: of the normal load: {', '.join(row.details['flags'])}", file=sys.stderr)
    for failure in failures:
        print(f"MISSED: {failure}", file=sys.stderr)
    return GATE_EXIT_CODE if failures else 0
