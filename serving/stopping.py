"""SIGTERM and Ctrl-C as an exception, but not in the middle of what an exception must not cut in two.

Python runs a signal's handler between any two steps of the main thread. An exception in the middle of sending a request
by gRPC leaves one that nobody ever finishes, and closing its channel, which the end of the process does at the latest,
waits for that without end. And an exception in the middle of an object's ``__del__``, which the collector may call
wherever we are, is forgotten: whoever waits in a loop asks ``raise_if_stopped``, too.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - a request from outside, not an error
    """A signal asked us to stop."""


class _MainThread:
    held = 0
    """How many blocks must not be interrupted now."""
    is_due = False
    """A signal came, and nobody has said that he knows."""


def stop_on_signals() -> None:
    """The first signal raises Stopped in the main thread, at once or after ``uninterrupted``; others do nothing.

    Whoever catches it calls ``heed_stop``.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        _MainThread.is_due = True
        raise_if_stopped()

    def forgotten(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = forgotten
    for each in _SIGNALS:
        signal.signal(each, stop)


def raise_if_stopped() -> None:
    """Raises Stopped if a signal came, and again until somebody heeds it; not within ``uninterrupted``."""
    if _MainThread.is_due and not _MainThread.held:
        raise Stopped


def heed_stop() -> None:
    """No more Stopped is raised: what follows is the end, in order."""
    _MainThread.is_due = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What the block does is done whole; then Stopped is raised if a signal came, whatever the block itself raised.

    For the main thread; short, since nothing stops meanwhile.
    """
    _MainThread.held += 1
    try:
        yield
    finally:
        _MainThread.held -= 1
        raise_if_stopped()
