"""Worker processes of the fuzzer: each makes a block of cases, sends it with many calls in flight, and judges it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.bench.fuzz.cases import Case, make_case
from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.bench.fuzz.requests import make_bases
from hstu_trt.bench.fuzz.verdict import SHED, Finding, Outcome, verdict
from hstu_trt.serving.deployment import read_deployment

CONNECTIONS = 4
"""Per worker; and one more for calls with headers: too many of them end the connection, or its other calls."""
IN_FLIGHT = 32
"""Calls at a time per worker."""
ANSWER_S = 20.0
"""An answer that takes longer is a finding: the server hangs."""
_UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass
class BlockResult:
    """What a block of cases came to."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind of mutation and status, or SHED."""
    findings: list[Finding] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def shed(self) -> int:
        """Requests that the server had no place for, so that nothing was judged."""
        return sum(count for (_, status), count in self.counts.items() if status == SHED)

    def add(self, other: BlockResult) -> None:
        """Takes another block's result in."""
        self.counts += other.counts
        self.findings += other.findings
        self.slowest_s = max(self.slowest_s, other.slowest_s)


class Sender:
    """Connections to a server. One event loop, one thread."""

    def __init__(self, url: str) -> None:
        import grpc

        self.loop = asyncio.new_event_loop()
        self._url, self._grpc = url, grpc
        self._channels: list[Any] = []
        self._calls: dict[tuple[int, str], Any] = {}

    def send(self, cases: list[Case]) -> list[Outcome]:
        """The outcome of each case."""
        return self.loop.run_until_complete(self._send(cases))

    async def _send(self, cases: list[Case]) -> list[Outcome]:
        if not self._channels:
            # Channels to one address share a connection unless their options tell them apart.
            options = [[*_UNLIMITED, ("hstu_trt.connection", number)] for number in range(CONNECTIONS + 1)]
            self._channels = [self._grpc.aio.insecure_channel(self._url, options=each) for each in options]
        outcomes: list[Any] = [None] * len(cases)
        waiting = iter(enumerate(cases))
        await asyncio.gather(*(self._work(number % CONNECTIONS, waiting, outcomes) for number in range(IN_FLIGHT)))
        return outcomes

    async def _work(self, channel: int, waiting: Iterator[tuple[int, Case]], outcomes: list[Any]) -> None:
        for place, case in waiting:
            began = time.monotonic()
            code, details, body = await self._call(CONNECTIONS if case.metadata else channel, case)
            outcomes[place] = Outcome(code, details, body, time.monotonic() - began)

    async def _call(self, channel: int, case: Case) -> tuple[str, str, bytes]:
        key = channel, case.method
        if key not in self._calls:
            self._calls[key] = self._channels[channel].unary_unary(case.method)
        compression = self._grpc.Compression.Gzip if case.gzip else None
        call = self._calls[key](case.body, timeout=ANSWER_S, metadata=case.metadata or None, compression=compression)
        try:
            return "OK", "", bytes(await call or b"")  # a stream may end well without a message
        except self._grpc.RpcError as error:
            return error.code().name, error.details() or "", b""


class Worker:
    """Makes, sends and judges blocks of cases."""

    def __init__(self, deployment: Path, url: str, seed: int) -> None:
        self.oracle = Oracle(read_deployment(deployment))
        self.bases = make_bases(self.oracle, self.oracle.signatures, seed)
        self.sender = Sender(url)
        self.canaries = [
            Case(number=-1, kind=f"canary of {model}", body=requests[-1].SerializeToString())
            for model, requests in self.bases.items()
        ]
        self._seed = seed

    def run(self, numbers: range) -> BlockResult:
        """The cases of those numbers."""
        cases = [make_case(self._seed, number, self.bases, self.oracle.signatures) for number in numbers]
        return self.run_cases(cases)

    def run_cases(self, cases: list[Case]) -> BlockResult:
        """Any cases."""
        result = BlockResult()
        for case, outcome in zip(cases, self.sender.send(cases), strict=True):
            result.counts[case.kind, outcome.status] += 1
            result.slowest_s = max(result.slowest_s, outcome.seconds)
            what = verdict(case, outcome, self.oracle)
            if what:
                result.findings.append(Finding(case, outcome, what))
        return result


_worker: Worker | None = None


def open_worker(deployment: Path, url: str, seed: int) -> None:
    """Makes this process a worker."""
    global _worker  # noqa: PLW0603 - what a process pool's initialiser leaves for its tasks
    _worker = Worker(deployment, url, seed)


def run_block(numbers: range) -> BlockResult:
    """A task of the pool."""
    assert _worker is not None
    return _worker.run(numbers)
