"""Embedding tables are mapped files: whoever writes into one that is served changes the answers, digest or not.

So the watch asks the kernel which shards the server's processes have mapped, and looks at their times and sizes. A file
that was replaced by renaming another over it, or deleted, stays mapped as it was, and nothing is wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

EVERY_S = 1.0
_REST = 20
"""Between two looks passes so many times what one took: there may be a hundred thousand shards."""
_SUFFIX = ".safetensors"
_PATH_FIELD = 5

_File = tuple[str, int]
"""Path and inode."""


class MappedFiles:
    """The shards that processes have mapped, as they were when they were first seen."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._known: dict[_File, tuple[int, int]] = {}
        self._due = 0.0

    def look(self) -> str | None:
        """Which file was overwritten since it was first seen; None: none, or it is not yet time to look again."""
        began = time.monotonic()
        if began < self._due:
            return None
        mapped = {file for pid in self._pids for file in _mapped_by(pid)}
        self._known = {file: self._known[file] for file in mapped & self._known.keys()}
        overwritten = None
        for file in sorted(mapped):
            state = _state(file)
            if state is not None and self._known.setdefault(file, state) != state:
                overwritten = file[0]
                break
        ended = time.monotonic()
        self._due = ended + max(EVERY_S, _REST * (ended - began))
        return overwritten


def _mapped_by(pid: int) -> Iterator[_File]:
    """From /proc/PID/maps (see proc(5)): address, permissions, offset, device, inode, path."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            fields = line.split(maxsplit=_PATH_FIELD)
            if len(fields) > _PATH_FIELD and fields[_PATH_FIELD].endswith(_SUFFIX.encode()):
                yield os.fsdecode(fields[_PATH_FIELD]), int(fields[_PATH_FIELD - 1])


def _state(file: _File) -> tuple[int, int] | None:
    """Size and time of the last change; None where the path leads to another file by now."""
    path, inode = file
    with suppress(OSError):
        found = os.stat(path)
        if found.st_ino == inode:
            return found.st_size, found.st_mtime_ns
    return None
