"""The processes of a running tritonserver, as the kernel tells of them: alive, stopped, or busy."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

SERVER = "tritonserver"
STOPPED = "was stopped by a signal"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STUB = b"triton_python_backend_stub"
_GONE = ("Z", "X", "x")
_STATE_STOPPED = "T"
_RUNNABLE = ("R", "D")
_WINDOW_S = 0.5
# Of one core. Threads that poll once in a while take less than 1 %.
_BUSY_SHARE = 0.06


class Watched:
    """One process: the server, or a Python model's stub, named after its model."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid, self.name = pid, name
        self.active_at = time.monotonic()
        """When it last did something: it computed, waited for a disk, or was about to."""
        self._window = (self.active_at, self._cpu_s())
        self._stopped = 0

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    def look(self) -> str | None:
        """What is wrong with it: it died, or was stopped by a signal for two looks in a row; None: nothing."""
        fields, now = _stat(self.pid), time.monotonic()
        if fields is None or fields[0] in _GONE:
            return "died"
        self._stopped = self._stopped + 1 if fields[0] == _STATE_STOPPED else 0
        if self._stopped > 1:
            return STOPPED
        since, used = self._window
        if fields[0] in _RUNNABLE:
            self.active_at = now
        if now - since >= _WINDOW_S:
            self._window = (now, self._cpu_s())
            if self._window[1] - used >= _BUSY_SHARE * (now - since):
                self.active_at = now
        return None

    def _cpu_s(self) -> float:
        fields = _stat(self.pid)
        return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def processes_of(server: int) -> list[Watched]:
    """The server, which leads a session of its own, and the stubs in it."""
    found = [Watched(server, SERVER)]
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields is None or int(fields[3]) != server or fields[0] in _GONE:
            continue
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(_STUB):
                # the file of the model: .../hstu/1/model.py
                found.append(Watched(int(entry.name), Path(os.fsdecode(words[1])).parents[1].name))
    return found


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (see proc(5)); None: there is no such process."""
    try:
        # The name, in brackets, may hold anything, half a letter too.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
