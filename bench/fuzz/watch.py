"""What a server and its model processes hold: processes, memory, handles, shared memory. Linux only."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.bench.load.process_tree import PROC, entries, family, lines_of

_SHARED = re.compile(r" (/dev/shm/\S+)")
_MOST_GROWTH_MIB, _MOST_MORE_HANDLES = 256, 100


@dataclass(frozen=True, kw_only=True)
class Held:
    """At one moment."""

    processes: dict[int, str]
    """Id -> name."""
    server_mib: float
    """Resident memory of tritonserver."""
    models_mib: float
    """Resident memory of its model processes."""
    shared_mib: float
    """Files in /dev/shm that any of them has mapped."""
    handles: int
    """Open file descriptors of all."""

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"server {self.server_mib:.0f} MiB, {len(self.processes) - 1} model processes {self.models_mib:.0f} MiB, "
            f"shared memory {self.shared_mib:.0f} MiB, {self.handles} handles"
        )


def held_by(server: int) -> Held:
    """What the server and its descendants hold."""
    members = {server, *family(server)}
    resident = {pid: _resident_mib(pid) for pid in members}
    shared = {
        found[1] for pid in members for line in lines_of(PROC / str(pid) / "maps") if (found := _SHARED.search(line))
    }
    names = {pid: name for pid in members for name in lines_of(PROC / str(pid) / "comm")}
    return Held(
        processes=names,
        server_mib=resident[server],
        models_mib=sum(resident.values()) - resident[server],
        shared_mib=sum(_size(path) for path in shared) / 2**20,
        handles=sum(entries(PROC / str(pid) / "fd") for pid in members),
    )


def growth(before: Held, after: Held, large_mib: int = 0) -> list[str]:
    """What has changed that must not: processes that died, and memory or handles that grew without need.

    large_mib: the size of large messages that the server has read; its allocator may keep the pages of one.
    """
    gone = [f"{name} ({pid})" for pid, name in before.processes.items() if pid not in after.processes]
    found = [f"died: {', '.join(gone)}"] if gone else []
    for what, old, new, most in (
        ("memory of the server", before.server_mib, after.server_mib, _MOST_GROWTH_MIB + large_mib),
        ("memory of the models", before.models_mib, after.models_mib, _MOST_GROWTH_MIB),
        ("shared memory", before.shared_mib, after.shared_mib, _MOST_GROWTH_MIB),
        ("open handles", before.handles, after.handles, _MOST_MORE_HANDLES),
    ):
        if new - old > most:
            found.append(f"{what} grew from {old:.0f} to {new:.0f}; {most} more is allowed")
    return found


def _resident_mib(pid: int) -> float:
    lines = lines_of(PROC / str(pid) / "status")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def _size(path: str) -> int:
    with suppress(OSError):
        return Path(path).stat().st_size
    return 0
