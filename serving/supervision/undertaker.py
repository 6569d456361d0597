"""A process that outlives us by a moment, to end the server that we leave behind when we are killed outright.

The kernel sends the server a SIGTERM then (``server.py``), which one that hangs never hears, nor do stubs that hang.
"""

from __future__ import annotations

import subprocess
import sys

GRACE_S = 5.0
"""For the server to finish its requests."""
# Standard input ends when we do, however we do.
_SCRIPT = """
import os, signal, sys, time
sys.stdin.read()
group, deadline = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
try:
    while time.monotonic() < deadline:
        os.killpg(group, 0)
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


class Undertaker:
    """Waits for our end, then for that of a process group, which it kills after ``GRACE_S``."""

    def __init__(self, group: int) -> None:
        self._child = subprocess.Popen(
            (sys.executable, "-IS", "-c", _SCRIPT, str(group), str(GRACE_S)),
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
