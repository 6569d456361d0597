"""Sends load: open loop, on a schedule that waits for nobody, or closed loop, a fixed number in flight.

In an open loop the latency of a request counts from the moment at which it was due. A client that falls behind, or a
server that stalls it, so lengthens latencies rather than hiding them (coordinated omission).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.load.target import Answer, Target
from hstu_trt.serving.signature import OVERLOADED

_LONGEST_ERROR = 160


@dataclass(frozen=True, kw_only=True)
class Records:
    """Every request of a run, in the order of sending. Times are seconds of one clock, float64 [requests]."""

    due: NDArray
    """When the request should have been sent; in a closed loop, when it was."""
    sent: NDArray
    done: NDArray
    """NaN: no answer came."""
    which: NDArray
    """int64: number of the request in its workload."""
    errors: dict[int, str]
    """Position -> what the request failed with."""
    cpu_s: float
    """CPU time that the client took."""
    cut_short: bool = False
    """Whether sending stopped since too many requests were waiting."""

    def __len__(self) -> int:
        return len(self.due)

    @property
    def shed(self) -> list[int]:
        """Positions of the requests that the server refused at once, since too many waited; among ``errors``."""
        return [at for at, text in self.errors.items() if OVERLOADED in text]


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests at given moments."""

    offsets_s: NDArray
    """Seconds from the start, ascending, float64 [requests]."""
    most_waiting: int
    """Sending stops at this many requests without an answer: the server is not keeping up."""

    def share(self, number: int, of: int) -> OpenLoop:
        """What client ``number`` of several sends."""
        return OpenLoop(offsets_s=self.offsets_s[number::of], most_waiting=-(-self.most_waiting // of))

    def senders(self, of: int) -> int:
        """How many of several clients send: all."""
        return of


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """A number of requests in flight; each answer makes room for the next request."""

    in_flight: int
    seconds: float = float("inf")
    requests: int = 1 << 62
    """Sending ends with the first of the two."""

    def share(self, number: int, of: int) -> ClosedLoop:
        """What client ``number`` of several sends; clients beyond the requests in flight send none."""
        busy = self.senders(of)
        requests = (self.requests + busy - 1 - number) // busy if number < busy else 0
        in_flight = (self.in_flight + of - 1 - number) // of
        return ClosedLoop(in_flight=in_flight, seconds=self.seconds, requests=requests)

    def senders(self, of: int) -> int:
        """How many of several clients send at all: they go through the requests in turn."""
        return min(of, self.in_flight)


Loop = OpenLoop | ClosedLoop


def poisson(rate: float, seconds: float, seed: int) -> NDArray:
    """Moments of a Poisson process, seconds from its start, float64 [about rate * seconds]; at least one."""
    rng = np.random.default_rng(seed)
    count = max(1, round(rate * seconds))
    return np.cumsum(rng.exponential(1.0 / rate, count))


class _Book:
    """Writes down what happens; answers come in on other threads."""

    def __init__(self) -> None:
        self.due: list[float] = []
        self.sent: list[float] = []
        self.which: list[int] = []
        self.done: dict[int, float] = {}
        self.errors: dict[int, str] = {}
        self.changed = threading.Condition()

    @property
    def waiting(self) -> int:
        return len(self.sent) - len(self.done)

    def send(self, target: Target, request: Any, which: int, due: float | None) -> None:
        """Sends a request that is due at that moment, or now."""
        at, now = len(self.sent), time.perf_counter()
        self.due.append(now if due is None else due)
        self.sent.append(now)
        self.which.append(which)

        def answered(answer: Answer) -> None:
            moment = time.perf_counter()
            error = answer.exception()
            with self.changed:
                if error is not None:
                    self.errors[at] = error_text(error)
                self.done[at] = moment
                self.changed.notify()

        target.submit(request).add_done_callback(answered)

    def records(self, cpu_s: float, *, cut_short: bool) -> Records:
        with self.changed:
            count = len(self.sent)
            errors = dict(self.errors)
            errors |= {at: "no answer" for at in range(count) if at not in self.done}
            done = np.array([self.done.get(at, np.nan) for at in range(count)])
        return Records(
            due=np.array(self.due),
            sent=np.array(self.sent),
            done=done,
            which=np.array(self.which, dtype=np.int64),
            errors=errors,
            cpu_s=cpu_s,
            cut_short=cut_short,
        )


def error_text(error: BaseException) -> str:
    """What a request failed with, in a line: gRPC's code and details, or the exception."""
    code = getattr(error, "code", None)
    text = f"{code().name}: {error.details()}" if callable(code) and hasattr(error, "details") else repr(error)
    return text.splitlines()[0][:_LONGEST_ERROR]


def drive(
    target: Target,
    prepared: Sequence[Any],
    loop: Loop,
    *,
    cycle: tuple[int, int] = (0, 1),
    start: float | None = None,
    patience_s: float = 30.0,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Records:
    """Sends a loop's requests, and waits for answers.

    cycle: first request of ``prepared`` and the step to the next one, over and over.
    start: moment of ``time.perf_counter`` at which the loop begins; None: now.
    patience_s: how long answers may take after the last request was sent.
    cpu_clock: of the client; that of this thread where the target computes in this process.
    """
    book, cpu = _Book(), cpu_clock()
    begin = time.perf_counter() if start is None else start
    _sleep_until(begin)
    send_all = _send_open if isinstance(loop, OpenLoop) else _send_closed
    cut_short = send_all(book, target, prepared, loop, begin, cycle)  # type: ignore[arg-type]
    with book.changed:
        book.changed.wait_for(lambda: book.waiting == 0, timeout=patience_s)
    return book.records(cpu_clock() - cpu, cut_short=cut_short)


def _send_open(
    book: _Book, target: Target, prepared: Sequence[Any], loop: OpenLoop, begin: float, cycle: tuple[int, int]
) -> bool:
    first, stride = cycle
    for number, offset in enumerate(loop.offsets_s.tolist()):
        if book.waiting >= loop.most_waiting:
            return True
        _sleep_until(begin + offset)
        which = (first + number * stride) % len(prepared)
        book.send(target, prepared[which], which, begin + offset)
    return False


def _send_closed(
    book: _Book, target: Target, prepared: Sequence[Any], loop: ClosedLoop, begin: float, cycle: tuple[int, int]
) -> bool:
    first, stride = cycle
    end, number = begin + loop.seconds, 0
    while number < loop.requests and loop.in_flight > 0:
        with book.changed:
            book.changed.wait_for(lambda: book.waiting < loop.in_flight, timeout=1.0)
        if time.perf_counter() >= end:
            break
        if book.waiting < loop.in_flight:
            which = (first + number * stride) % len(prepared)
            book.send(target, prepared[which], which, None)
            number += 1
    return False


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)


def merge(parts: Sequence[Records]) -> Records:
    """The records of several clients as those of one, in the order of sending."""
    sent = np.concatenate([part.sent for part in parts])
    order = np.argsort(sent, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    errors = {
        int(place[start + at]): text
        for start, part in zip(starts[:-1], parts, strict=True)
        for at, text in part.errors.items()
    }
    return Records(
        due=np.concatenate([part.due for part in parts])[order],
        sent=sent[order],
        done=np.concatenate([part.done for part in parts])[order],
        which=np.concatenate([part.which for part in parts])[order],
        errors=errors,
        cpu_s=sum(part.cpu_s for part in parts),
        cut_short=any(part.cut_short for part in parts),
    )
