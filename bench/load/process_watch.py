"""What a server's processes hold: memory, handles, threads and shared memory, by ``/proc``."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hstu_trt.bench.load.process_tree import PROC, entries, family

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
    gpu_bytes: int = 0
    """Of all GPUs' memory, whoever holds it: a container's process ids are not those that the driver knows."""

    def facts(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def usage(pid: int) -> Usage:
    """What the process and its descendants hold now; what ends meanwhile counts as nothing."""
    members = [(member, PROC / str(member)) for member in family(pid)]
    regions = {region for _, folder in members for region in _shared_regions(folder)}
    return Usage(
        memory_bytes=sum(_anonymous(folder) for _, folder in members),
        handles=sum(entries(folder / "fd") for _, folder in members),
        threads=sum(entries(folder / "task") for _, folder in members),
        shared_bytes=sum(_allocated(Path(region)) for region in regions),
        processes=len(members),
        gpu_bytes=gpu_bytes(),
    )


def gpu_bytes() -> int:
    """Memory in use on all GPUs here; 0 where there is none, or nvidia-smi cannot tell."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return sum(int(line) << 20 for line in said.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _anonymous(folder: Path) -> int:
    try:
        found = _ANONYMOUS.search((folder / "smaps_rollup").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


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
