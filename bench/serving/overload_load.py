"""The parts of an overload run: too much load and what follows it, and many connections at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.load.client import OpenLoop, Records, error_text, poisson
from hstu_trt.bench.load.target import INFER
from hstu_trt.serving.signature import OVERLOADED

WINDOW_S = 0.25
"""Recovery is told by windows of so long."""
_GOOD_WINDOWS = 4


def burst_schedule(*, normal: float, burst: float, seconds: float, after_s: float, seed: int) -> OpenLoop:
    """Poisson arrivals at the rate ``burst`` for ``seconds``, then at ``normal``: one schedule, without a pause."""
    first = poisson(burst, seconds, seed)
    first = first[first < seconds]
    return OpenLoop(
        offsets_s=np.concatenate([first, seconds + poisson(normal, after_s, seed + 1)]), most_waiting=1 << 30
    )


@dataclass(frozen=True, kw_only=True)
class Split:
    """Requests by what became of them. Milliseconds float64."""

    accepted_ms: NDArray
    refused_ms: NDArray
    """From sending to the refusal."""
    failed: dict[str, int]
    """Errors other than refusals."""


def split(records: Records, first_s: float, end_s: float) -> Split:
    """The requests that were due in a span, seconds from the first one; latencies of answers count from when due."""
    since = records.due - records.due[0]
    chosen = (since >= first_s) & (since < end_s)
    shed = np.zeros(len(records), bool)
    shed[records.shed] = True
    failed = np.zeros(len(records), bool)
    failed[list(records.errors)] = True
    texts = [records.errors[int(at)] for at in np.flatnonzero(chosen & failed & ~shed)]
    return Split(
        accepted_ms=1e3 * (records.done - records.due)[chosen & ~failed],
        refused_ms=1e3 * (records.done - records.sent)[chosen & shed],
        failed={text: texts.count(text) for text in set(texts)},
    )


def answers_per_s(records: Records, first_s: float, end_s: float) -> float:
    """Good answers that came in a span, per second."""
    good = np.ones(len(records), bool)
    good[list(records.errors)] = False
    moments = (records.done - records.due[0])[good]
    return float(((moments >= first_s) & (moments < end_s)).sum() / (end_s - first_s))


def recovery_s(records: Records, burst_s: float, normal_ms: float, normal_shed: float = 0.0) -> float:
    """Seconds from the end of the burst until requests are answered, and answered as fast, as they normally are.

    The begin of the first second that refuses no larger share than ``normal_shed``, as clumps of random arrivals may,
    and of whose windows none has a median above ``normal_ms``: a later hiccup of the machine is not the burst's.
    Infinite if there is no such second.
    """
    windows = np.floor((records.due - records.due[0] - burst_s) / WINDOW_S).astype(int)
    latency = 1e3 * (records.done - records.due)
    latency[list(records.errors)] = np.inf
    for window in range(int(windows.max()) + 2 - _GOOD_WINDOWS):
        second = [latency[windows == at] for at in range(window, window + _GOOD_WINDOWS)]
        refused = np.isinf(np.concatenate(second))
        if all(np.median(part) <= normal_ms for part in second if len(part)) and (
            refused.sum() <= normal_shed * len(refused)
        ):
            return window * WINDOW_S
    return float("inf")


@dataclass(frozen=True, kw_only=True)
class Connections:
    """What a number of clients got, each with a connection of its own and one request, all at once."""

    asked: int
    answered: int
    shed: int
    failed: dict[str, int]
    seconds: float
    """Until the last answer."""


def ask_over_connections(url: str, prepared: Sequence[bytes], count: int, timeout_s: float) -> Connections:
    """Opens connections, sends a request over each at the same time, and closes them."""
    import grpc

    # Without the option, channels to one address share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(url, options=options) for _ in range(count)]
    try:
        for channel in channels:
            grpc.channel_ready_future(channel).result(timeout_s)
        began = time.perf_counter()
        calls = [
            channel.unary_unary(INFER).future(prepared[number % len(prepared)], timeout=timeout_s)
            for number, channel in enumerate(channels)
        ]
        errors = [_error_of(call) for call in calls]
        seconds = time.perf_counter() - began
    finally:
        for channel in channels:
            channel.close()
    texts = [text for text in errors if text is not None and OVERLOADED not in text]
    return Connections(
        asked=count,
        answered=errors.count(None),
        shed=count - errors.count(None) - len(texts),
        failed={text: texts.count(text) for text in set(texts)},
        seconds=seconds,
    )


def _error_of(call: Any) -> str | None:
    """What a call failed with, None if it was answered; waits for it."""
    error = call.exception()
    return None if error is None else error_text(error)
