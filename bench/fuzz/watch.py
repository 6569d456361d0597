"""What a server and its model processes hold: processes, memory, handles, shared memory. Linux only."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
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
    children = _children()
    family, waiting = [], [server]
    while waiting:
        pid = waiting.pop()
        family.append(pid)
        waiting += children.get(pid, [])
    resident = {pid: _resident_mib(pid) for pid in family}
    shared = {path for pid in family for path in _shared_files(pid)}
    names = {pid: name for pid in family if (name := _name(pid))}
    return Held(
        processes=names,
        server_mib=resident[server],
        models_mib=sum(resident.values()) - resident[server],
        shared_mib=sum(_size(path) for path in shared) / 2**20,
        handles=sum(_handles(pid) for pid in family),
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


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":  # one that died, and that its parent has not asked about
                found.setdefault(int(parent), []).append(int(path.parent.name))
    return found


def _name(pid: int) -> str:
    with suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    return ""


def _resident_mib(pid: int) -> float:
    with suppress(OSError, StopIteration):
        lines = (_PROC / str(pid) / "status").read_text(errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    return 0.0


def _shared_files(pid: int) -> set[str]:
    with suppress(OSError):
        return set(_SHARED.findall((_PROC / str(pid) / "maps").read_text(errors="replace")))
    return set()


def _size(path: str) -> int:
    with suppress(OSError):
        return Path(path).stat().st_size
    return 0


def _handles(pid: int) -> int:
    with suppress(OSError):
        return len(list((_PROC / str(pid) / "fd").iterdir()))
    return 0
