"""A bounded queue between the thread on which Triton hands requests over and the one that works on them.

Triton can bound a queue itself (``dynamic_batching.default_queue_policy.max_queue_size``), at a price: with any bound
it stops prefetching, and then nothing wakes its batcher when an instance becomes free, so that requests wait for its
timer of 500 ms. Measured with 16 requests in flight on tritonserver 2.51: 7 requests per second in place of 520 through
``ranking``, 21 in place of 820 through ``ranking_fused``; later versions decide the same way. So the guard bounds what
is in flight (``csrc/guard_frontend.cpp``), and Triton's queues hold it. Where there is no guard, the models of this
room take over whatever Triton hands them, keep it here, and refuse what finds no place. That is dearer: with 11
requests in flight, 320 per second through ``ranking`` in place of 503, 413 in place of 636 through ``ranking_fused``.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hstu_trt.contract.errors import ConfigError

DEFAULT_PLACES = 8
"""Requests that may wait in front of a model.

A queue with random arrivals and equal services at 80 % of a server's capacity holds fewer than 10 requests 99 % of
the time: the tail falls as exp(-2 (1 - 0.8) / 0.8 n). Eight that wait and three that are in the steps, or eight in a
batch, are more. So at that rate little is refused, of services that differ as requests do some hundredths, and in the
worst overload an accepted request waits for less than twice as many services as the slowest hundredth does then.
"""
BATCHED_PLACES = 32
"""On a GPU a batch takes little longer than a request, so a whole batch of ``ranking_fused`` may gather."""
_CLOSE_S = 20.0
"""So long a model that is unloaded may take for what waits."""

T = TypeVar("T")


def queue_places(text: str) -> int:
    """A number of places. Raises ConfigError: without a bound, a queue grows until the memory is gone."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{text!r} requests may wait: give 1 or more; {DEFAULT_PLACES} is the default")
    return int(text)


@dataclass(frozen=True)
class LoadCounts:
    """What happened to requests since the last look."""

    shed: int = 0
    """Refused since no place was free."""
    begun: int = 0
    """Requests that work was begun on, those that did not have to wait among them."""
    waited_s: float = 0.0
    """Sum over the requests that were begun."""
    batches: dict[int, int] = field(default_factory=dict)
    """Number of users -> batches."""
    batch_s: dict[int, float] = field(default_factory=dict)
    """Number of users -> seconds that these batches took."""
    tokens: int = 0
    """History events and candidates of these batches."""
    waiting: int = 0
    """Requests that wait now."""


class LoadTally:
    """Adds up ``LoadCounts``. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._shed, self._begun, self._waited_s, self._tokens = 0, 0, 0.0, 0
        self._batches: defaultdict[int, int] = defaultdict(int)
        self._batch_s: defaultdict[int, float] = defaultdict(float)

    def shed(self, requests: int) -> None:
        """Requests that were refused."""
        with self._lock:
            self._shed += requests

    def waited(self, seconds: float, requests: int = 1) -> None:
        """Seconds that requests have waited, all together, before they were begun."""
        with self._lock:
            self._waited_s += seconds
            self._begun += requests

    def batch(self, *, users: int, tokens: int, seconds: float) -> None:
        """A batch that was run."""
        with self._lock:
            self._batches[users] += 1
            self._batch_s[users] += seconds
            self._tokens += tokens

    def take(self, waiting: int) -> LoadCounts:
        """What was counted since the last call, with the number of requests that wait now."""
        with self._lock:
            counts = LoadCounts(
                self._shed, self._begun, self._waited_s, self._batches, self._batch_s, self._tokens, waiting
            )
            self._clear()
        return counts


class WaitingRoom(Generic[T]):
    """Keeps at most ``places`` items until its own thread works on them, several at once.

    work: gets 1 to ``most_at_once`` items, the oldest first, and must not raise. before: called before items are taken,
    and may wait; they keep their places meanwhile.
    """

    def __init__(
        self, work: Callable[[list[T]], None], *, places: int, most_at_once: int = 1,
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.tally = LoadTally()
        self._work, self._before = work, before
        self._places, self._most_at_once = places, most_at_once
        self._items: deque[tuple[T, float]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._run, name="waiting-room", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that have not been begun."""
        return len(self._items)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is being worked on; stays so until the next ``offer``."""
        with self._changed:
            return self._idle()

    def _idle(self) -> bool:
        return not self._items and not self._busy

    def offer(self, items: Sequence[T]) -> Sequence[T]:
        """Takes as many items as there are places, and returns those that are refused."""
        now = time.perf_counter()
        with self._changed:
            free = max(0, self._places - len(self._items))
            self._items.extend((item, now) for item in items[:free])
            self._changed.notify_all()
        refused = items[free:]
        if refused:
            self.tally.shed(len(refused))
        return refused

    def linger(self, seconds: float) -> None:
        """Returns when all is done, or after that time."""
        with self._changed:
            self._changed.wait_for(self._idle, seconds)

    def close(self) -> None:
        """Ends the thread when all that waits has been worked on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while self._wait_for_items():
            self._before()
            with self._changed:
                taken = [self._items.popleft() for _ in range(min(self._most_at_once, len(self._items)))]
            now = time.perf_counter()
            self.tally.waited(sum(now - since for _, since in taken), len(taken))
            self._work([item for item, _ in taken])
            del taken  # or the last requests would be held until the next come

    def _wait_for_items(self) -> bool:
        """False: closed, and nothing is left."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._items or self._closed)
            self._busy = bool(self._items)
            return self._busy
