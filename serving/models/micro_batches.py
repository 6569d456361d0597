"""Requests wait here while a GPU works; what waits when it has room becomes the next micro-batch.

Two threads keep the GPU fed: one lays out and submits the next micro-batch while those before it compute, the other
waits for the oldest and hands its scores out. A batch grows while others are on their way, so that its size follows
the load by itself: one request alone goes off at once, and under pressure batches are full.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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


Answer = Callable[["list[NDArray] | Exception"], None]
"""Gets the scores [candidates, tasks] of each user of a request, or why there are none."""


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

    answer: Answer
    scores: list[NDArray | None]
    missing: int
    """Users without scores."""
    unbegun: int
    """Users that are in no micro-batch yet."""
    came: float = field(default_factory=time.perf_counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Its users may be in two micro-batches, one of which fails to start while the other ends."""


@dataclass(frozen=True)
class _User:
    feed: UserFeed
    tokens: int
    request: _Pending
    place: int


class MicroBatches:
    """Packs users of waiting requests by tokens, in their order. Any thread may put requests in.

    The counts' seconds of a micro-batch last from its start to its scores; several may be on their way.
    """

    def __init__(self, scorer: Scorer, limits: BatchLimits) -> None:
        self._scorer, self._limits = scorer, limits
        self._most_in_flight = min(limits.in_flight, scorer.depth)
        self._waiting: deque[_User] = deque()
        self._requests = self._in_flight = 0
        self._closing = False
        self._changed = threading.Condition()
        self._flying: queue.SimpleQueue[tuple[Any, list[_User], float] | None] = queue.SimpleQueue()
        self._tally = LoadTally()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("submit", self._submit_all), ("collect", self._collect_all))
        ]
        for thread in self._threads:
            thread.start()

    def require_place(self) -> None:
        """Raises FullError where a request would find no place: before the work of reading it. Counts the refusal."""
        if self._requests >= self._limits.places:
            self._tally.shed(1)
            raise FullError(f"{self._limits.places} requests wait already")

    def put(self, users: Sequence[UserFeed], answer: Answer) -> None:
        """Adds a request's users; ``answer`` is called once, from another thread. Waits for nothing.

        Raises ClosedError, and FullError where no place is free.
        """
        request = _Pending(answer, [None] * len(users), len(users), len(users))
        entries = [_User(user, self._scorer.size_of(user).tokens, request, n) for n, user in enumerate(users)]
        with self._changed:
            if self._closing:
                raise ClosedError("the model is being unloaded")
            self.require_place()
            self._waiting.extend(entries)
            self._requests += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Answers what waits, then ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take_counts(self) -> LoadCounts:
        """What was counted since the last call."""
        return self._tally.take(self._requests)

    def _submit_all(self) -> None:
        while batch := self._next():
            users, alone = batch
            began = time.perf_counter()
            try:
                ticket = self._scorer.submit([user.feed for user in users], alone=alone)
            except Exception as error:  # the threads must live whatever a request holds
                self._landed(users, began)
                _fail(users, error)
                continue
            self._flying.put((ticket, users, began))
        self._flying.put(None)

    def _next(self) -> tuple[list[_User], bool] | None:
        """The next micro-batch, and whether it has nothing beside it; None once all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < self._most_in_flight if self._waiting else self._closing)
            if not self._waiting:
                return None
            users = [self._waiting.popleft()]
            tokens = users[0].tokens
            while self._waiting and len(users) < self._limits.users:
                if tokens + self._waiting[0].tokens > self._limits.tokens:
                    break
                users.append(self._waiting.popleft())
                tokens += users[-1].tokens
            alone = not self._in_flight and not self._waiting and len(users) == 1
            self._in_flight += 1
            self._begin(users)
        return users, alone

    def _begin(self, users: list[_User]) -> None:
        """Frees the places of requests that have no other users."""
        now = time.perf_counter()
        for user in users:
            user.request.unbegun -= 1
            if not user.request.unbegun:
                self._requests -= 1
                self._tally.waited(now - user.request.came)

    def _collect_all(self) -> None:
        while flying := self._flying.get():
            ticket, users, began = flying
            try:
                scores = self._scorer.collect(ticket)
            except Exception as error:
                self._landed(users, began)
                _fail(users, error)
                continue
            self._landed(users, began)
            for user, part in zip(users, scores, strict=True):
                _deliver(user, part)

    def _landed(self, users: list[_User], began: float) -> None:
        seconds = time.perf_counter() - began
        self._tally.batch(users=len(users), tokens=sum(user.tokens for user in users), seconds=seconds)
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()


def _deliver(user: _User, scores: NDArray) -> None:
    request = user.request
    with request.lock:
        request.scores[user.place] = scores
        request.missing -= 1
        complete = request.missing == 0
    if complete:
        request.answer([part for part in request.scores if part is not None])


def _fail(users: list[_User], error: Exception) -> None:
    """Every request of the users gets the error, once; its other users' scores are for nobody."""
    for request in {id(user.request): user.request for user in users}.values():
        with request.lock:
            first, request.missing = request.missing > 0, -1
        if first:
            request.answer(error)
