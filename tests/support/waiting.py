"""Waiting for what comes sooner or later: how long that takes is the machine's business, and no test's."""

import time

import numpy as np

PATIENCE_S = 60.0
"""Far more than anything here takes, on a machine that has much else to do too."""


def eventually(condition, what="", timeout_s=PATIENCE_S):
    """The first result of ``condition()`` that is true. Raises AssertionError after the timeout.

    what: what is waited for, or a function that tells how far it is.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what or "it does not come true"
        time.sleep(0.02)
    return found


def holds_eventually(check, timeout_s=PATIENCE_S):
    """Calls ``check()`` until it raises no AssertionError; after the timeout raises its last one."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def settled(read, apart_s):
    """What ``read()`` gives twice in a row: a number, or several. Counters may tell of the past a moment late.

    apart_s: longer than what is counted needs to be told.
    """
    seen = [read()]

    def stands_still():
        time.sleep(apart_s)
        seen.append(read())
        return np.array_equal(seen[-1], seen[-2])

    eventually(stands_still, lambda: f"it goes on and on: {seen}")
    return seen[-1]
