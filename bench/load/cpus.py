"""Cores for a server and others for its clients, so that neither takes the other's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cpus:
    """Cores of each side; None: all."""

    server: frozenset[int] | None
    client: frozenset[int] | None


def cpu_set(text: str | None) -> frozenset[int] | None:
    """Cores as ``0-7,12`` names them. Raises ConfigError, also for cores that this process may not use."""
    if text is None:
        return None
    cpus: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            cpus |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise ConfigError(f"CPU cores {text!r}: write them as 0-7,12") from None
    allowed = os.sched_getaffinity(0)
    if not cpus or cpus - allowed:
        raise ConfigError(f"CPU cores {text!r}: this process may use {','.join(map(str, sorted(allowed)))}")
    return frozenset(cpus)


def pin(processes: Iterable[int], cpus: frozenset[int]) -> None:
    """Keeps the threads of processes on cores; what they start later inherits them."""
    for process in processes:
        for thread in _threads(process):
            with suppress(ProcessLookupError):  # ended meanwhile
                os.sched_setaffinity(thread, cpus)


def _threads(process: int) -> list[int]:
    with suppress(OSError):
        return [int(entry.name) for entry in Path(f"/proc/{process}/task").iterdir()]
    return []
