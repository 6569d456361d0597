"""Requests wait here while a GPU works; what waits when it has room becomes the next micro-batch.

One thread does all that needs Python: it reads requests, lays out and submits micro-batches, and hands scores out.
Another waits for the GPU. More threads at work would wait for each other: each of numpy's operations on a request lets
go of Python's lock, and whoever else wants it comes in between. A batch grows while others are on their way, so that
its size follows the load by itself: one request alone goes off at once, and under pressure batches are full.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.engines.cuda.staging import UserFeed
from hstu_trt.serving.models.waiting_room import LoadCounts, LoadTally


class Scorer(Protocol):
    """What computes; ``engines.cuda.runner.FusedRunner`` is one."""

    @property
    def depth(self) -> int: ...

    def size_of(self, user: UserFeed) -> Any: ...

    def submit(self, users: Sequence[UserFeed], *, alone: bool = False) -> Any: ...

    def collect(self, batch: Any) -> list[NDArray]: ...

    def capture_next(self) -> None: ...


_CAPTURE_EVERY_S = 0.25

Read = Callable[[], Sequence[UserFeed]]
"""Makes the users of a request; raises for a wrong one."""
Answer = Callable[["list[NDArray] | Exception"], None]
"""Gets the scores [candidates, tasks] of each user of a request, or why there are none. Must not raise."""


class ClosedError(HstuTrtError):
    """The model is being unloaded."""

    exit_code = 1


class FullError(HstuTrtError):
    """As many requests wait as may."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """When a micro-batch is full, and how many requests may wait for one."""

    tokens: int
    users: int
    places: int
    """A request holds its place until the last of its users is in a micro-batch."""
    in_flight: int = 2
    """Micro-batches submitted at a time: one computes, the others are there when it ends."""


@dataclass(eq=False)
class _Pending:
    """A request of which some users are still waited for."""

    read: Read
    answer: Answer
    came: float = field(default_factory=time.perf_counter)
    scores: list[NDArray | None] = field(default_factory=list)
    missing: int = 0
    """Users without scores; -1: the request has failed."""
    unbegun: int = 0
    """Users that are in no micro-batch yet."""


@dataclass(frozen=True)
class _User:
    feed: UserFeed
    tokens: int
    request: _Pending
    place: int


@dataclass(eq=False)
class _Flight:
    """A micro-batch on its way."""

    ticket: Any
    users: list[_User]
    began: float
    result: list[NDArray] | Exception = field(default_factory=list)


class MicroBatches:
    """Packs users of waiting requests by tokens, in their order. Any thread may put requests in.

    The counts' seconds of a micro-batch last from its start to its scores; several may be on their way.
    """

    def __init__(self, scorer: Scorer, limits: BatchLimits) -> None:
        self._scorer, self._limits = scorer, limits
        self._most_in_flight = min(limits.in_flight, scorer.depth)
        self._waiting: deque[_Pending] = deque()
        """Requests that were not read."""
        self._users: deque[_User] = deque()
        """Users of requests that were, in no micro-batch yet."""
        self._requests = self._in_flight = 0
        self._closing = False
        self._changed = threading.Condition()
        self._flying: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._landed: deque[_Flight] = deque()
        self._captured_at = 0.0
        self._tally = LoadTally()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("batches", self._work), ("landings", self._await_landings))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, read: Read, answer: Answer) -> None:
        """Adds a request; ``read`` and ``answer`` are called once each, from another thread. Waits for nothing.

        Raises ClosedError, and FullError where no place is free, which it counts.
        """
        with self._changed:
            if self._closing:
                raise ClosedError("the model is being unloaded")
            if self._requests >= self._limits.places:
                self._tally.shed(1)
                raise FullError(f"{self._limits.places} requests wait already")
            self._waiting.append(_Pending(read, answer))
            self._requests += 1
            if self._in_flight < self._most_in_flight:
                self._changed.notify()

    def close(self) -> None:
        """Answers what waits, then ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    def take_counts(self) -> LoadCounts:
        """What was counted since the last call."""
        return self._tally.take(self._requests)

    def _work(self) -> None:
        while self._wait_for_work():
            while self._landed:
                self._deliver(self._landed.popleft())
            if self._in_flight < self._most_in_flight and (users := self._next()):
                self._submit(users)
        self._flying.put(None)

    def _wait_for_work(self) -> bool:
        """False: closed, and nothing is left."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            return bool(self._landed or self._waiting or self._users)

    def _has_work(self) -> bool:
        if self._waiting or self._users:
            return bool(self._landed) or self._in_flight < self._most_in_flight
        return bool(self._landed) or (self._closing and not self._in_flight)

    def _next(self) -> list[_User]:
        """The users of the next micro-batch, if any wait."""
        users: list[_User] = []
        tokens = 0
        for user in self._oldest_first():
            if users and (len(users) == self._limits.users or tokens + user.tokens > self._limits.tokens):
                break
            users.append(self._users.popleft())
            tokens += user.tokens
        return users

    def _oldest_first(self) -> Iterator[_User]:
        """The user at the head of the queue, again and again, reading requests as needed."""
        while self._users or self._waiting:
            if self._users:
                yield self._users[0]
            else:
                self._read(self._waiting.popleft())

    def _read(self, request: _Pending) -> None:
        try:
            feeds = request.read()
            users = [_User(feed, self._scorer.size_of(feed).tokens, request, n) for n, feed in enumerate(feeds)]
        except Exception as error:  # the thread must live whatever a request holds
            self._free_places(1)
            request.answer(error)
            return
        request.scores, request.missing, request.unbegun = [None] * len(users), len(users), len(users)
        self._users.extend(users)

    def _submit(self, users: list[_User]) -> None:
        alone = len(users) == 1 and not (self._in_flight or self._waiting or self._users)
        flight = _Flight(None, users, time.perf_counter())
        self._begin(flight)
        self._in_flight += 1
        try:
            flight.ticket = self._scorer.submit([user.feed for user in users], alone=alone)
        except Exception as error:
            flight.result = error
            self._deliver(flight)
            return
        if alone:
            self._land(flight)
            self._deliver(flight)
        else:
            self._flying.put(flight)
        self._capture()

    def _begin(self, flight: _Flight) -> None:
        """Frees the places of requests that have no other users."""
        begun = 0
        for user in flight.users:
            user.request.unbegun -= 1
            if not user.request.unbegun:
                begun += 1
                self._tally.waited(flight.began - user.request.came)
        self._free_places(begun)

    def _free_places(self, places: int) -> None:
        with self._changed:
            self._requests -= places

    def _capture(self) -> None:
        """Makes the graph of one kind of batch that was new, while the batch itself is on its way.

        While nobody waits; under load, where that never is, so seldom that no request waits for two of them.
        """
        now = time.perf_counter()
        if (self._waiting or self._users) and now - self._captured_at < _CAPTURE_EVERY_S:
            return
        # Without it, such a batch goes on as it went now.
        with contextlib.suppress(Exception):
            self._scorer.capture_next()
        self._captured_at = now

    def _await_landings(self) -> None:
        while flight := self._flying.get():
            self._land(flight)
            with self._changed:
                self._landed.append(flight)
                self._changed.notify()
            del flight  # or the last requests would be held until the next come

    def _land(self, flight: _Flight) -> None:
        """Waits for a micro-batch."""
        try:
            flight.result = self._scorer.collect(flight.ticket)
        except Exception as error:
            flight.result = error

    def _deliver(self, flight: _Flight) -> None:
        self._in_flight -= 1
        users, seconds = flight.users, time.perf_counter() - flight.began
        self._tally.batch(users=len(users), tokens=sum(user.tokens for user in users), seconds=seconds)
        if isinstance(flight.result, Exception):
            _fail(users, flight.result)
            return
        for user, scores in zip(users, flight.result, strict=True):
            _take_scores(user, scores)


def _take_scores(user: _User, scores: NDArray) -> None:
    request = user.request
    request.scores[user.place] = scores
    request.missing -= 1
    if request.missing == 0:
        request.answer([part for part in request.scores if part is not None])


def _fail(users: list[_User], error: Exception) -> None:
    """Every request of the users gets the error, once; its other users' scores are for nobody."""
    for request in {id(user.request): user.request for user in users}.values():
        if request.missing > 0:
            request.missing = -1
            request.answer(error)
