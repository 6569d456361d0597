"""Work beside the serving of requests: it takes the processor time that they leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

_NICENESS = 10

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> T:
    """Runs ``work`` in a thread of low priority and waits for it. It must start no threads that outlive it."""
    with ThreadPoolExecutor(1, initializer=_yield_to_others) as pool:
        return pool.submit(work).result()


def _yield_to_others() -> None:
    """On Linux niceness belongs to a thread; others inherit it, and only root may take it back."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
