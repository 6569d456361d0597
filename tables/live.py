"""What is served now, replaced while it is being read: every batch sees one whole version, old ones are freed.

    live = Live(first)
    with live.pin() as version:       # one batch
        version.tables.lookup_features(...)
    live.swap(second)                 # another thread; running batches go on with the first

Epochs by reference counts: ``pin`` and its end take a lock for a counter's sake, and nothing is locked while rows are
read. What was swapped out is freed by the thread that swaps (``sweep``), never by a batch: giving back the memory of a
large table takes long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """Something that gives its memory back."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class _Epoch(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value
        self.readers = 0


class Live(Generic[T]):
    """Holds the value in use. Threads may share it."""

    def __init__(self, value: T) -> None:
        self._lock = threading.Lock()
        self._current = _Epoch(value)
        self._old: list[_Epoch[T]] = []
        self._swapping = threading.Lock()

    @property
    def current(self) -> T:
        """What the next batch will see. Only the thread that swaps may use it without a pin."""
        return self._current.value

    @property
    def draining(self) -> int:
        """Values that were swapped out and are still held: by a batch, or until the next ``sweep``."""
        return len(self._old)

    @contextmanager
    def pin(self) -> Iterator[T]:
        """The value in use, kept until the end of the block whatever is swapped in meanwhile."""
        with self._lock:
            epoch = self._current
            epoch.readers += 1
        try:
            yield epoch.value
        finally:
            with self._lock:
                epoch.readers -= 1

    def swap(self, value: T) -> None:
        """Every batch that begins from now on sees ``value``. Does not wait for the others."""
        with self._lock:
            self._old.append(self._current)
            self._current = _Epoch(value)
        self.sweep()

    def sweep(self) -> int:
        """Closes what no batch reads any more; returns how many old values are still read."""
        with self._swapping:
            with self._lock:
                idle = [epoch for epoch in self._old if not epoch.readers]
                self._old = [epoch for epoch in self._old if epoch.readers]
                left = len(self._old)
            for epoch in idle:
                epoch.value.close()
        return left

    def drain(self, timeout_s: float, poll_s: float = 0.001) -> bool:
        """Sweeps until no old value is read any more; False after the timeout."""
        deadline = time.monotonic() + timeout_s
        while self.sweep():
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    def close(self) -> None:
        """Closes everything, whoever reads."""
        with self._lock:
            epochs, self._old = [*self._old, self._current], []
        for epoch in epochs:
            epoch.value.close()
