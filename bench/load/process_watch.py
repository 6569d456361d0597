"""What a server's processes hold: memory, handles, threads and shared memory, by ``/proc``."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

_PROC = Path("/proc")
_ANONYMOUS = re.compile(r"^Anonymous:\s+(\d+) kB", re.MULTILINE)
_SHARED = re.compile(r"(/dev/shm/\S+)")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process and all that descend from it hold."""

    memory_bytes: int
    """Anonymous memory: what they allocated, without mapped files, whose pages the kernel may take back."""
    handles: int
    threads: int
    shared_bytes: int
    """Of the regions in /dev/shm that they map, each counted once."""
    processes: int

    def facts(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def family(pid: int) -> list[int]:
    """The process and its descendants that run now."""
    parents: dict[int, int] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # ended meanwhile
    found = {pid} & parents.keys()
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return sorted(found)


def usage(pid: int) -> Usage:
    """What the process and its descendants hold now; what ends meanwhile counts as nothing."""
    members = [(member, _PROC / str(member)) for member in family(pid)]
    regions = {region for _, folder in members for region in _shared_regions(folder)}
    return Usage(
        memory_bytes=sum(_anonymous(folder) for _, folder in members),
        handles=sum(_entries(folder / "fd") for _, folder in members),
        threads=sum(_entries(folder / "task") for _, folder in members),
        shared_bytes=sum(_allocated(Path(region)) for region in regions),
        processes=len(members),
    )


def _anonymous(folder: Path) -> int:
    try:
        found = _ANONYMOUS.search((folder / "smaps_rollup").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _entries(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def _shared_regions(folder: Path) -> Iterator[str]:
    try:
        yield from set(_SHARED.findall((folder / "maps").read_text(errors="replace")))
    except OSError:
        return


def _allocated(region: Path) -> int:
    try:
        return 512 * region.stat().st_blocks
    except OSError:
        return 0


class UsageWatch:
    """Takes the usage at intervals while it is open; ``seen`` holds (seconds, usage). A context manager."""

    def __init__(self, pid: int, every_s: float = 0.5) -> None:
        self.seen: list[tuple[float, Usage]] = []
        self._pid, self._every_s = pid, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> UsageWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while True:
            self.seen.append((time.monotonic() - began, usage(self._pid)))
            if self._stop.wait(self._every_s):
                return
