"""What an operator wants to hear of, as JSON lines: starts, refreshes, and each request that was refused or failed.

    RUN/events.jsonl   {"time": "2026-11-22T20:44:25.123Z", "event": "request", "source": "embedding_lookup", ...}

Every process of a server appends to it, ``serve`` and the models alike. Triton's own log stays text for
people. A file that has grown to MOST_BYTES becomes ``events.jsonl.1``, in place of the one before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

EVENTS_FILE = "events.jsonl"
MOST_BYTES = 64 << 20
MOST_REQUESTS_PER_S = 100
"""Of one process: whoever sends bad requests without end must not fill a disk."""
_MOST_CHARS = 2000
MOST_ID_CHARS = 128
"""Of a request's id, as its client chose it."""
_POLL_S = 0.2


class Events:
    """Appends to the events of a run folder. Threads may share it; where nothing can be written, nothing is."""

    def __init__(self, run: Path, source: str) -> None:
        self.path = run / EVENTS_FILE
        self._source = source
        self._lock = threading.Lock()
        self._second, self._written, self._left_out = 0, 0, 0

    def write(self, event: str, **facts: Any) -> None:
        """One line; facts that are None are left out."""
        now = datetime.now(timezone.utc)
        known = {"time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "event": event}
        line = {**known, "source": self._source, "pid": os.getpid(), **facts}
        text = json.dumps({key: value for key, value in line.items() if value is not None}) + "\n"
        with contextlib.suppress(OSError):
            # One write to a file opened for appending: lines of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                os.write(descriptor, text.encode())
                if os.fstat(descriptor).st_size > MOST_BYTES:
                    self._make_room(descriptor)
            finally:
                os.close(descriptor)

    def _make_room(self, full: int) -> None:
        """Renames the full file, unless another process has: the file that it began must not replace the full one."""
        fcntl.flock(full, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(full), os.stat(self.path)):
            self.path.replace(self.path.with_name(f"{EVENTS_FILE}.1"))

    def request(self, request_id: str, status: str, message: str) -> None:
        """A request that was refused or failed. Beyond MOST_REQUESTS_PER_S they are counted only."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._written = second, 0
            self._written += 1
            if self._written > MOST_REQUESTS_PER_S:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out or None, 0
        self.write(
            "request",
            request_id=request_id[:MOST_ID_CHARS] or None,
            status=status,
            message=message[:_MOST_CHARS],
            left_out_before=left_out,
        )


class EventFollower:
    """Hands on each new line of the events, from now on, in a thread of its own."""

    def __init__(self, run: Path, hand_on: Callable[[str], None]) -> None:
        self._path, self._hand_on = run / EVENTS_FILE, hand_on
        self._file = self._opened()
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)
        self._rest = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """After what is written by now."""
        self._stop.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._read()
        self._read()

    def _read(self) -> None:
        """The rest of the file that is open, and of its successor: it may have been renamed meanwhile."""
        replaced = self._file is None or self._is_replaced(self._file)
        self._hand_on_rest()
        if not replaced:
            return
        if self._file is not None:
            self._file.close()
        self._file, self._rest = self._opened(), b""
        self._hand_on_rest()

    def _hand_on_rest(self) -> None:
        if self._file is None:
            return
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            self._hand_on(line.decode(errors="replace"))

    def _is_replaced(self, file: BinaryIO) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except OSError:
            return True

    def _opened(self) -> BinaryIO | None:
        try:
            return self._path.open("rb")
        except OSError:
            return None
