"""Model processes that a signal stops for a moment.

From 1 s on, Triton answers INTERNAL itself ("Stub process is not healthy"), and ends with an abort (2.51) when the
process goes on. On a busy machine a test may not get to let them go on in time: nothing follows from it then.
"""

import contextlib
import os
import signal
import time

from served import Serve

MOST_S = 0.8
_TURNS = 5


class TooLongError(Exception):
    """They stood still for so long that Triton may have given them up."""


class Stop:
    """How long they have stood still."""

    def __init__(self):
        self._began, self._ended = time.monotonic(), None

    @property
    def seconds(self):
        return (self._ended or time.monotonic()) - self._began

    def wait_for(self, condition):
        """Until that is so, or they must go on."""
        while not condition() and self.seconds <= MOST_S:
            time.sleep(0.005)

    def end(self):
        self._ended = time.monotonic()

    def require_short(self):
        if self.seconds > MOST_S:
            raise TooLongError


@contextlib.contextmanager
def standing_still(pids):
    """Stops processes while the block runs; gives the ``Stop``."""
    stop = Stop()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield stop
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        stop.end()


def asked_while_standing_still(deployment, ask):
    """What ``ask(serve)`` returns, of a server without the supervisor; of another one after TooLongError."""
    for _ in range(_TURNS):
        serve = Serve(deployment, "--no-restart")
        try:
            answer = ask(serve)
        except TooLongError:
            serve.stop(signal.SIGKILL)
            continue
        assert serve.stop() == 0
        return answer
    raise AssertionError(f"what was to be seen did not come within {MOST_S:g} s, in {_TURNS} turns")
