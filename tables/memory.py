"""Memory that this process may still take: the machine's, or its container's where that is less."""

from __future__ import annotations

from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes to be had without swapping, by ``MemAvailable`` and the limits of the control groups (v2, or v1)."""
    return max(0, min([_of_machine(proc), *_left_of_groups(proc, cgroups)]))


def _of_machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _left_of_groups(proc: Path, cgroups: Path) -> list[int]:
    """Limit less use of this process's groups and of those above; files that are cached count as free."""
    left = []
    for line in _lines(proc / "self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, use, cached = (
            (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else (cgroups, "memory.max", "memory.current", "inactive_file")
        )
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(*parts[:depth])
            numbers = [_number(folder / name) for name in (limit, use)]
            if numbers[0] is not None and numbers[1] is not None:
                left.append(numbers[0] - numbers[1] + _entry(folder / "memory.stat", cached))
    return left


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """None where there is no limit, ``max``, or no such group."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int:
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
