"""``hstu-trt bench fuzz``: bad input to a deployment over gRPC, by a seed, against what it must answer.

Starts the deployment, or takes a running server of it. Every answer must be the one that the same model gives in this
process, or a clear fault of the client's; the server must stay whole, in time and within its memory. Exit code 1 on a
finding, which is written to a file that ``--replay`` sends again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from hstu_trt.bench.arguments import count, positive, suite_parser, whole
from hstu_trt.bench.fuzz.files import read_case, write_finding
from hstu_trt.bench.fuzz.large import Large, send_large
from hstu_trt.bench.fuzz.report import MOST_SHOWN, report_json, report_text
from hstu_trt.bench.fuzz.send import BlockResult, Worker, open_worker, run_block
from hstu_trt.bench.fuzz.verdict import SHED
from hstu_trt.bench.fuzz.watch import Held, growth, held_by
from hstu_trt.bench.fuzz.wire import WireAttack
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.server_process import ServerProcess
from hstu_trt.serving.starting import check, start

BLOCK = 1000
_PROGRESS_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much, and of what."""

    seed: int
    requests: int | None = None
    """None: as many as fit in ``seconds``."""
    seconds: float | None = None
    first: int = 0
    workers: int = 2
    large_mib: int = 300
    """Size of the large messages, of which each run sends one of each kind; 0 sends none."""
    out: Path = Path("build/fuzz_server")


@dataclass
class Report:
    """What a run found."""

    plan: Plan
    result: BlockResult = field(default_factory=BlockResult)
    large: list[Large] = field(default_factory=list)
    wire: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What is wrong with the server, beside findings of single cases."""
    files: list[Path] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    """At the beginning, before the large messages and at the end, where the server is ours."""
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.result.findings or self.faults)


@contextlib.contextmanager
def started(deployment: Deployment, url: str | None) -> Iterator[tuple[str, ServerProcess | None]]:
    """The url, and the process of a server that is ours."""
    if url is not None:
        yield url, None
        return
    check(deployment)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, _ = start(deployment, plan)
    try:
        yield plan.url, process
    finally:
        process.drain()


def fuzz(deployment: Deployment, plan: Plan, url: str | None = None) -> Report:
    """Runs the plan. Raises StartError where the server does not start."""
    report = Report(plan)
    began = time.monotonic()
    with started(deployment, url) as (address, process):
        local = Worker(deployment.path, address, plan.seed)
        report.held += [held_by(process.pid)] if process else []
        with WireAttack(address, plan.seed) as wire:
            _run_blocks(deployment, address, plan, report, local)
            if process and process.exit_code is None:
                report.held.append(held_by(process.pid))
                report.faults += growth(report.held[0], report.held[1])
            if plan.large_mib and not report.result.findings:
                report.large = send_large(address, local.bases[local.oracle.served[0]][0], plan.large_mib << 20)
        report.wire = dict(wire.counts)
        report.faults += [f"{n} connections refused: {name}" for name, n in wire.refused.items()]
        report.faults += [f"{large.kind}: {large.fault}" for large in report.large if large.fault]
        _canary(local, report)
        if process and process.exit_code is not None:
            report.faults.append(f"the server died with code {process.exit_code}; see {process.plan.log}")
        elif process:
            report.held.append(held_by(process.pid))
            report.faults += growth(report.held[0], report.held[-1], plan.large_mib if report.large else 0)
    report.seconds = time.monotonic() - began
    report.files = [write_finding(plan.out, plan.seed, found) for found in report.result.findings[:MOST_SHOWN]]
    return report


def _run_blocks(deployment: Deployment, url: str, plan: Plan, report: Report, local: Worker) -> None:
    """Blocks by worker processes, with a canary and a line of progress in between."""
    until = time.monotonic() + plan.seconds if plan.seconds else None
    blocks = _blocks(plan, until)
    told = time.monotonic()
    arguments = (deployment.path, url, plan.seed)
    with ProcessPoolExecutor(plan.workers, get_context("spawn"), open_worker, arguments) as pool:
        waiting: set[Future[BlockResult]] = {
            pool.submit(run_block, block) for _, block in zip(range(plan.workers), blocks, strict=False)
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                report.result.add(future.result())
                _canary(local, report)
                block = next(blocks, None)
                if block and len(report.result.findings) < MOST_SHOWN and not report.faults:
                    waiting.add(pool.submit(run_block, block))
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                total = report.result.counts.total()
                print(f"{total} requests, {len(report.result.findings)} findings", file=sys.stderr, flush=True)


def _blocks(plan: Plan, until: float | None) -> Iterator[range]:
    first = plan.first
    while (plan.requests is None or first < plan.first + plan.requests) and (until is None or time.monotonic() < until):
        last = first + BLOCK if plan.requests is None else min(first + BLOCK, plan.first + plan.requests)
        yield range(first, last)
        first = last


def _canary(local: Worker, report: Report) -> None:
    """A right request to every model, beside all that goes on."""
    result = local.run_cases(local.canaries)
    report.result.slowest_s = max(report.result.slowest_s, result.slowest_s)
    wrong = [f"canary: {found.what}" for found in result.findings]
    wrong += [f"canary: {kind}: {code}" for kind, code in result.counts if code not in ("OK", SHED) and not wrong]
    report.faults += wrong


def replay(deployment: Deployment, path: Path, url: str | None) -> Report:
    """Sends one recorded case again."""
    seed, case = read_case(path)
    report = Report(Plan(seed=seed, first=case.number, requests=1))
    with started(deployment, url) as (address, _):
        local = Worker(deployment.path, address, seed)
        report.result = local.run_cases([case])
        _canary(local, report)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("fuzz", __doc__)
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--url", help="host:port of a running server of it (default: one is started)")
    parser.add_argument("--seed", type=whole, help="of the cases (default: from the clock, and printed)")
    parser.add_argument("--requests", type=count, help="how many (default: as many as fit in --seconds)")
    parser.add_argument("--seconds", type=positive, help="how long (default: 60, if --requests is not given)")
    parser.add_argument("--first", type=whole, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--workers", type=count, default=2, help="processes that send (default: 2)")
    parser.add_argument("--large-mib", type=whole, default=300, help="of large messages (default: 300; 0: none)")
    parser.add_argument("--replay", type=Path, help="send the request of such a file again, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz_server"), help="folder for findings")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    deployment = read_deployment(args.deployment)
    if args.replay:
        report = replay(deployment, args.replay, args.url)
    else:
        seed = int(time.time()) if args.seed is None else args.seed
        print(f"seed {seed}", file=sys.stderr, flush=True)
        seconds = args.seconds or (None if args.requests else 60.0)
        plan = Plan(
            seed=seed, requests=args.requests, seconds=seconds, first=args.first, workers=args.workers,
            large_mib=args.large_mib, out=args.out,
        )  # fmt: skip
        report = fuzz(deployment, plan, args.url)
    print(json.dumps(report_json(report)) if args.json else report_text(report))
    return 0 if report.is_clean else 1
