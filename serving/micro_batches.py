"""Requests wait here while a GPU works; what waits when it has room becomes the next micro-batch.

Two threads keep the GPU fed: one lays out and submits the next micro-batch while those before it compute, the other
waits for the oldest and hands its scores out. A batch grows while others are on their way, so that its size follows
the load by itself: one request alone goes off at once, and under pressure batches are full.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.engines.cuda.staging import UserFeed


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


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """When a micro-batch is full, and how much waits here rather than in Triton's queue, which can refuse."""

    tokens: int
    users: int
    in_flight: int = 2
    """Micro-batches submitted at a time: one computes, the others are there when it ends."""

    @property
    def waiting_tokens(self) -> int:
        """As much as the next two micro-batches take."""
        return 2 * self.tokens


@dataclass(eq=False)
class _Pending:
    """A request of which some users are still waited for."""

    answer: Answer
    scores: list[NDArray | None]
    missing: int
    came: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Its users may be in two micro-batches, one of which fails to start while the other ends."""


@dataclass(frozen=True)
class _User:
    feed: UserFeed
    tokens: int
    request: _Pending
    place: int


@dataclass
class Counts:
    """What became of the micro-batches so far."""

    users: Counter[int] = field(default_factory=Counter)
    """Micro-batches by their number of users."""
    tokens: int = 0
    waited_s: float = 0.0
    """Sum over users, from the request's arrival to its micro-batch's start."""
    computed_s: float = 0.0
    """Sum over micro-batches, from start to scores."""


class MicroBatches:
    """Packs users of waiting requests by tokens, in their order. Any thread may put requests in."""

    def __init__(self, scorer: Scorer, limits: BatchLimits) -> None:
        self._scorer, self._limits = scorer, limits
        self._most_in_flight = min(limits.in_flight, scorer.depth)
        self._waiting: deque[_User] = deque()
        self._tokens = self._in_flight = 0
        self._closing = False
        self._changed = threading.Condition()
        self._flying: queue.SimpleQueue[tuple[Any, list[_User], float] | None] = queue.SimpleQueue()
        self._counts = Counts()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("submit", self._submit_all), ("collect", self._collect_all))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, users: Sequence[UserFeed], answer: Answer) -> None:
        """Adds a request's users; ``answer`` is called once, from another thread. Waits while enough is waiting.

        Raises ClosedError.
        """
        request = _Pending(answer, [None] * len(users), len(users))
        entries = [_User(user, self._scorer.size_of(user).tokens, request, n) for n, user in enumerate(users)]
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._tokens < self._limits.waiting_tokens)
            if self._closing:
                raise ClosedError("the model is being unloaded")
            self._waiting.extend(entries)
            self._tokens += sum(entry.tokens for entry in entries)
            self._changed.notify_all()

    def close(self) -> None:
        """Answers what waits, then ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def take_counts(self) -> Counts:
        """What was counted since the last call."""
        with self._changed:
            counts, self._counts = self._counts, Counts()
        return counts

    def _submit_all(self) -> None:
        while batch := self._next():
            users, alone = batch
            began = time.monotonic()
            try:
                ticket = self._scorer.submit([user.feed for user in users], alone=alone)
            except Exception as error:  # the threads must live whatever a request holds
                self._landed()
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
            self._tokens -= tokens
            self._in_flight += 1
            self._count(users, tokens)
            self._changed.notify_all()
        return users, alone

    def _count(self, users: list[_User], tokens: int) -> None:
        now = time.monotonic()
        self._counts.users[len(users)] += 1
        self._counts.tokens += tokens
        self._counts.waited_s += sum(now - user.request.came for user in users)

    def _collect_all(self) -> None:
        while flying := self._flying.get():
            ticket, users, began = flying
            try:
                scores = self._scorer.collect(ticket)
            except Exception as error:
                self._landed()
                _fail(users, error)
                continue
            self._landed(time.monotonic() - began)
            for user, part in zip(users, scores, strict=True):
                _deliver(user, part)

    def _landed(self, seconds: float = 0.0) -> None:
        with self._changed:
            self._in_flight -= 1
            self._counts.computed_s += seconds
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
