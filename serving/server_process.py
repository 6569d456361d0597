"""A tritonserver as a child process: started, drained, killed, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from hstu_trt.serving.server import EXIT_TIMEOUT_S, LaunchPlan
from hstu_trt.serving.supervision.undertaker import Undertaker, remove_regions

_REAP_S = 2.0
# Becomes its arguments after asking the kernel (PR_SET_PDEATHSIG) for a SIGTERM when we are gone, killed outright say.
_TIED_TO_US = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)


def tied_to_us(command: Sequence[str]) -> tuple[str, ...]:
    """A command that gets a SIGTERM when the thread that started it ends."""
    return (sys.executable, "-IS", "-c", _TIED_TO_US, *command)


class ServerProcess:
    """A running tritonserver, its output going to the plan's log. Stop it with ``drain``.

    It also ends with the thread that started it, since nobody is left to watch it then: drained, or killed after
    ``undertaker.GRACE_S``.
    """

    def __init__(self, plan: LaunchPlan) -> None:
        self.plan = plan
        with open_log(plan.log) as log:
            # A session of its own: Ctrl-C reaches us alone, and we drain the server.
            self._child = subprocess.Popen(
                tied_to_us(plan.command),
                env={**os.environ, **plan.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._undertaker = Undertaker(self._child.pid, plan.regions)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def drain(self, timeout_s: float = EXIT_TIMEOUT_S + 10) -> int:
        """Asks the server to finish its requests and exit; kills it and its stubs after the timeout."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
        code = self._child.wait()
        self.bury()
        return code

    def kill(self) -> None:
        """Ends the server and its stubs at once, hung ones too; their port is free then."""
        self._child.kill()
        self._child.wait()
        self.bury()

    def bury(self) -> None:
        """Ends stubs that outlived the server, since one can hang when the server was killed, and removes what is left
        in shared memory."""
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        reap(self._child.pid)
        remove_regions(self.plan.regions)
        self._undertaker.dismiss()


def reap(group: int) -> None:
    """Asks after processes that were killed and had been left to us, as they are to a container's first process: nobody
    else would, and they would stay in the table of processes. One that cannot end now, in a driver say, is left there.
    """
    deadline = time.monotonic() + _REAP_S
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            pid, _ = os.waitpid(-group, os.WNOHANG)
            if pid == 0:
                time.sleep(0.01)


def open_log(path: Path) -> IO[bytes]:
    """An empty log; the one before it is kept beside it. On a full disk the server goes on without a log."""
    try:
        with suppress(FileNotFoundError):
            path.replace(path.with_suffix(".before.log"))
        return path.open("wb")
    except OSError:
        return open(os.devnull, "wb")
