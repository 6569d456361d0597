"""A process that outlives us by a moment, to end the server that we leave behind when we are killed outright.

The kernel sends the server a SIGTERM then (``server_process.py``), which one that hangs never hears, nor do its stubs.
Regions of shared memory outlive processes that are killed, in /dev/shm until the next boot: they are removed by name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GRACE_S = 5.0
"""For the server to finish its requests."""
# Standard input ends when we do, however we do.
_SCRIPT = """
import glob, os, signal, sys, time
sys.stdin.read()
group, deadline, regions = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), sys.argv[3]
try:
    while time.monotonic() < deadline:
        os.killpg(group, 0)
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
for region in glob.glob(regions + "*"):
    os.unlink(region)
"""
_SHARED_MEMORY = Path("/dev/shm")


def remove_regions(prefix: str) -> None:
    """Removes what processes that have ended left in shared memory, by the beginning of its names."""
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


class Undertaker:
    """Waits for our end, then for that of a process group, which it kills after ``GRACE_S``; removes its regions."""

    def __init__(self, group: int, regions: str) -> None:
        self._child = subprocess.Popen(
            (sys.executable, "-IS", "-c", _SCRIPT, str(group), str(GRACE_S), str(_SHARED_MEMORY / regions)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Sends it away: the group has ended. May be called again."""
        self._child.kill()
        self._child.wait()
        if self._child.stdin is not None:
            self._child.stdin.close()
