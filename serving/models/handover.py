"""How many requests are between ``embedding_lookup`` and ``hstu``, so that the rest waits in front of the first step.

Each step of the ensemble has a queue of its own in Triton, without a bound, and the slowest one, ``hstu``, would fill
its own with requests whose rows are looked up already. ``hstu`` therefore says when it begins and ends a request, a
byte each in a named pipe, and ``embedding_lookup`` stays at most ``MOST_AHEAD`` requests ahead.

A request may get lost on the way: its client gave up, say. Nothing is on the way, whatever the count says, once
``hstu`` has had nothing to do for ``LOST_S``.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

MOST_AHEAD = 4
"""Enough that ``hstu`` does not wait for rows; with 2, requests of 2 ms lost a third of their throughput."""
ENOUGH_AHEAD = 2
"""So few the requests ahead become before more are sent: turns of the processes are dear when all cores are busy."""
LOST_S = 0.02

_PIPE = "hstu.turns"
_BEGUN, _DONE = b"b", b"d"
_READ_BYTES = 1 << 16


class Handover:
    """The side of ``embedding_lookup``. One thread at a time."""

    def __init__(self, folder: Path) -> None:
        """Makes the pipe in the server's folder. Raises OSError."""
        self._path = folder / _PIPE
        self._pipe = _open(self._path)
        self._ahead = self._running = 0

    def close(self) -> None:
        """Removes the pipe."""
        os.close(self._pipe)
        with contextlib.suppress(OSError):
            self._path.unlink()

    def sent(self) -> None:
        """A request goes on to ``hstu``."""
        self._ahead += 1

    @property
    def has_room(self) -> bool:
        """Whether a request may go on."""
        self._read()
        return self._ahead < MOST_AHEAD

    def wait_for_room(self) -> None:
        """Returns when a request may go on."""
        if self.has_room:
            return
        while self._ahead > ENOUGH_AHEAD:
            heard = select.select([self._pipe], [], [], LOST_S)[0]
            if heard:
                self._read()
            elif not self._running:
                self._ahead = 0

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._pipe, _READ_BYTES)
            begun = said.count(_BEGUN)
            self._ahead = max(0, self._ahead - begun)
            self._running = max(0, self._running + begun - said.count(_DONE))


class Turns:
    """The side of ``hstu``."""

    def __init__(self, folder: Path) -> None:
        """Opens the pipe, or makes it. Raises OSError."""
        self._pipe = _open(folder / _PIPE)

    def close(self) -> None:
        """Closes the pipe."""
        os.close(self._pipe)

    @contextlib.contextmanager
    def turn(self, requests: int) -> Iterator[None]:
        """While requests are being worked on."""
        self._say(_BEGUN * requests)
        try:
            yield
        finally:
            self._say(_DONE * requests)

    def _say(self, said: bytes) -> None:
        # A full pipe: nobody has read for tens of thousands of requests, so nobody counts them.
        with contextlib.suppress(BlockingIOError):
            os.write(self._pipe, said)


def _open(path: Path) -> int:
    """The pipe, for reading and writing, so that neither side waits for the other nor sees it end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
