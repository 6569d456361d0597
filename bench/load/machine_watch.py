"""What a machine does during a run: CPUs by the kernel's counters, GPUs by nvidia-smi."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from contextlib import suppress
from typing import Any

from hstu_trt.bench.load.process_tree import PROC, family_of, process_stats

GPU_QUERY = {
    "utilisation": "utilization.gpu",
    "memory_mib": "memory.used",
    "power_w": "power.draw",
    "sm_clock_mhz": "clocks.sm",
    "temperature_c": "temperature.gpu",
}
_EVERY_MS = 200
_STAT = PROC / "stat"


class MachineWatch:
    """Watches while it is open; ``facts`` afterwards. A context manager.

    own_server: whether the server under load is a child of this process, so that what the rest of the machine does can
    be told from it.
    """

    def __init__(self, *, own_server: bool = True) -> None:
        self._own_server = own_server

    def __enter__(self) -> MachineWatch:
        self._cpu, self._ours = _cpu_ticks(), _family_ticks()
        self._smi = _start_smi()
        self._lines: list[str] = []
        return self

    def __exit__(self, *_: object) -> None:
        before, self._cpu = self._cpu, _cpu_ticks()
        self._busy = _busy_share(before, self._cpu)
        self._others = None
        if self._own_server and before is not None and self._cpu is not None and self._busy is not None:
            ours = _family_ticks() - self._ours
            self._others = round(max(0.0, self._busy - ours / (self._cpu[1] - before[1])), 3)
        if self._smi is None:
            return
        self._smi.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._lines = self._smi.communicate(timeout=5)[0].splitlines()

    def facts(self) -> dict[str, Any]:
        """``cpu_busy``: share of all CPUs, ``others_cpu``: what of it was not the load and its server (null: unknown);

        ``gpu``: median and largest of each figure, null without a GPU.
        """
        return {"cpu_busy": self._busy, "others_cpu": self._others, "gpu": summarise_gpu(self._lines)}


def summarise_gpu(lines: list[str]) -> dict[str, dict[str, float]] | None:
    """Lines of ``nvidia-smi --query-gpu`` as figure -> median and max; what a GPU does not report is left out."""
    columns: dict[str, list[float]] = {name: [] for name in GPU_QUERY}
    for line in lines:
        for name, cell in zip(columns, line.split(","), strict=False):
            with suppress(ValueError):
                columns[name].append(float(cell))
    found = {
        name: {"median": statistics.median(values), "max": max(values)} for name, values in columns.items() if values
    }
    return found or None


def _start_smi() -> subprocess.Popen[str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ",".join(GPU_QUERY.values())
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _cpu_ticks() -> tuple[int, int] | None:
    """Busy and all ticks of all CPUs since boot."""
    try:
        fields = [int(field) for field in _STAT.read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _busy_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None or after[1] == before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 3)


def _family_ticks() -> int:
    """Ticks that this process and all that descend from it, those that have ended too, have taken so far."""
    stats = process_stats()
    return sum(int(field) for pid in family_of(os.getpid(), stats) for field in stats[pid][11:15])


def environment() -> dict[str, Any]:
    """The machine, for a report: CPUs, memory, kernel, GPU with its driver and power limit (null without one)."""
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": gpu_description(),
    }


def gpu_description() -> str | None:
    """Name, driver, power limit and largest clock of the GPU here."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "name,driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None
