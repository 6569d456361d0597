"""Processes and what descends from them, by ``/proc`` of Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
ENDED = "Z"
"""State of a process that has ended, and that its parent has not asked about."""


def process_stats() -> dict[int, list[str]]:
    """Process id -> the fields of its ``stat`` behind the name: state, parent's id, and so on (man 5 proc)."""
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            found[int(path.parent.name)] = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
    return {pid: fields for pid, fields in found.items() if len(fields) > 1}


def family_of(pid: int, stats: dict[int, list[str]]) -> set[int]:
    """The process and all that descend from it, those that have ended too; empty if it is not there."""
    family = {pid} & stats.keys()
    while grown := {child for child, fields in stats.items() if int(fields[1]) in family} - family:
        family |= grown
    return family


def family(pid: int) -> list[int]:
    """The process and its descendants that run now."""
    stats = process_stats()
    return sorted(member for member in family_of(pid, stats) if stats[member][0] != ENDED)


def entries(folder: Path) -> int:
    """How many entries a folder of ``/proc/PID`` has, as ``fd`` and ``task``; 0 once the process is gone."""
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file of ``/proc``; none once the process is gone."""
    try:
        yield from path.read_text(errors="replace").splitlines()
    except OSError:
        return
