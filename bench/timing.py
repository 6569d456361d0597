"""Timing on a CUDA GPU: graphs of many calls, replayed between events, contenders in turn.

Clocks drift with the heat, so only times taken in turn in one run may be compared. A contender brings one call per
input set, and its graph goes through the sets, so that no call finds its inputs in the L2 cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]

_WARM_UP_CALLS = 3
_GRAPH_US = 2000.0
"""A graph lasts at least this long, so that the resolution of events does not count."""
_GRAPH_CALLS = 200
_MOST_SETS = 8


@dataclass(frozen=True)
class Timing:
    """Time of one call."""

    median_us: float
    """Median over the rounds."""
    spread: float
    """Slowest less fastest round, as a share of the median."""

    @classmethod
    def of(cls, rounds_us: Sequence[float]) -> Timing:
        """The timing of a contender's rounds."""
        median = statistics.median(rounds_us)
        return cls(median_us=median, spread=(max(rounds_us) - min(rounds_us)) / median)


class Contender(Protocol):
    """What can be timed."""

    def measure_us(self, target_ms: float) -> float:
        """Time of one call in microseconds, from measurements that last about ``target_ms``."""


def time_in_turn(
    contenders: Mapping[str, Contender], *, rounds: int, target_ms: float, pause_ms: float = 0.0
) -> dict[str, list[float]]:
    """Measures all contenders in each round, beginning with another one each time; name -> a time per round.

    pause_ms: idle time before each measurement, so that none is slowed by the heat of the one before it.
    """
    names = list(contenders)
    rounds_us: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        first = round_number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            time.sleep(pause_ms / 1e3)
            rounds_us[name].append(contenders[name].measure_us(target_ms))
    return rounds_us


def input_sets(bytes_read: int, cache_bytes: int) -> int:
    """How many input sets a graph must go through so that each call reads from memory: twice the cache, 2 to 8 sets."""
    return min(_MOST_SETS, max(2, -(-2 * cache_bytes // max(bytes_read, 1))))


class GraphedCalls:
    """Calls captured in a CUDA graph, in turn and repeated until the graph is long enough to be timed."""

    def __init__(self, calls: Sequence[Call]) -> None:
        import torch

        self._alive = list(calls)  # the graph holds the addresses of their tensors, not the tensors
        self._stream = torch.cuda.Stream()
        call_us = self._warm_up(calls)
        repeats = _graph_repeats(call_us, len(calls))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            for _ in range(repeats):
                for call in calls:
                    call()
        self._calls = repeats * len(calls)
        self._graph_ms = statistics.median(self._replays_ms(3))

    def _warm_up(self, calls: Sequence[Call]) -> float:
        """Runs every call a few times, which loads modules and compiles; returns the time of one in microseconds."""
        import torch

        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
            begin = _event()
            for _ in range(_WARM_UP_CALLS):
                for call in calls:
                    call()
            end = _event()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (_WARM_UP_CALLS * len(calls))

    def replay(self) -> None:
        """Runs the whole graph once."""
        self._graph.replay()

    def measure_us(self, target_ms: float) -> float:
        """Time of one call in microseconds: the median over replays that last about ``target_ms``."""
        replays = max(3, round(target_ms / self._graph_ms))
        return statistics.median(self._replays_ms(replays)) * 1e3 / self._calls

    def _replays_ms(self, replays: int) -> list[float]:
        """Times of the graph's replays, without the first one, in which the clocks and caches settle."""
        import torch

        events = []
        for _ in range(replays + 1):
            self._graph.replay()
            events.append(_event())
        torch.cuda.synchronize()
        return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(events)]


def _graph_repeats(call_us: float, calls: int) -> int:
    wanted = -(-_GRAPH_US // (max(call_us, 1e-3) * calls))
    return max(1, min(int(wanted), _GRAPH_CALLS // calls))


def _event() -> torch.cuda.Event:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
