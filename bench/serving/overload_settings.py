"""What an overload run is asked for, and what it must keep."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.bench.arguments import count, positive, suite_parser
from hstu_trt.bench.load.options import add_served_option
from hstu_trt.bench.result_rows import RESULTS
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.models.waiting_room import DEFAULT_PLACES


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What must hold. The rows tell what did."""

    refusal_p99_ms: float = 100.0
    """"At once": far below what waiting would have cost, and below what a caller needs to try another replica."""
    latency_ratio: float = 2.0
    throughput_share: float = 0.9
    memory_growth: float = 0.1
    """Of the anonymous memory of server and model processes, from before the burst to its end."""
    normal_shed: float = 0.1
    """Refused at the normal rate, whose arrivals come in clumps."""
    recovery_s: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a run is driven."""

    factor: float = 3.0
    share: float = 0.8
    """Of the peak: the rate at which the service level is measured."""
    seconds: float = 10.0
    after_s: float = 5.0
    in_flight: int = DEFAULT_PLACES
    connections: int = 1000
    timeout_s: float = 30.0
    seed: int = 1001
    clients: int = 1
    """Processes."""
    server_cpus: str | None = None
    """Cores, as ``cpu_set`` reads them; None: all."""
    client_cpus: str | None = None

    def __post_init__(self) -> None:
        least = min(self.seconds, self.after_s, self.in_flight, self.clients)
        if self.factor <= 1 or not 0 < self.share < 1 or least <= 0:
            raise ConfigError("an overload run needs a factor above 1, a share of the peak below 1, and seconds")


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The verb's command line."""
    setting, promises = Setting(), Promises()
    parser = suite_parser("overload", text)
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    add_served_option(parser)
    parser.add_argument("--factor", type=positive, default=setting.factor, help="of the peak (default: 3)")
    parser.add_argument("--share", type=positive, default=setting.share, help="of the peak: normal load (default: 0.8)")
    parser.add_argument("--seconds", type=positive, default=setting.seconds, help="of each part (default: 10)")
    parser.add_argument(
        "--in-flight", type=count, default=setting.in_flight, help="to find the peak (default: %(default)s)"
    )
    parser.add_argument("--clients", type=count, default=setting.clients, help="client processes (default: 1)")
    parser.add_argument("--url", help="of a server that runs, with --server-pid (default: one is started)")
    parser.add_argument("--server-pid", type=count, help="process whose descendants are that server and its models")
    parser.add_argument("--server-cpus", metavar="CPUS", help="cores of the server, as 0-7,12 (default: all)")
    parser.add_argument("--client-cpus", metavar="CPUS", help="cores of the clients (default: all)")
    parser.add_argument("--connections", type=count, default=setting.connections, help="(default: 1000)")
    parser.add_argument(
        "--refusal-ms", type=positive, default=promises.refusal_p99_ms, help="bound on p99 (default: 100)"
    )
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="of the workload (default: ci)")
    parser.add_argument("--commit", help="for the rows, where this is no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS / "overload_cpu.jsonl", help="rows are added to this file")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser
