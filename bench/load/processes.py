"""Several client processes that send one load together, for rates beyond one Python process."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from hstu_trt.bench.load.client import Loop, Records, drive, merge
from hstu_trt.bench.load.target import Target
from hstu_trt.contract.errors import HstuTrtError

_AHEAD_S = 0.2
"""From the order to start until the start, so that every client has it in time."""


class Address(Protocol):
    """Opens targets; travels to other processes."""

    def open(self) -> Target: ...


class Clients:
    """Processes that hold a connection and the prepared requests. A context manager.

    One client lives in this process. The clocks agree: ``perf_counter`` is the machine's monotonic clock.
    """

    def __init__(self, address: Address, requests: Sequence[Any], *, processes: int = 1) -> None:
        """requests: tensors as ``Target.prepare`` takes them."""
        self.address, self.processes = address, processes
        self.target = address.open()
        self.prepared = [self.target.prepare(request) for request in requests]
        self._children: list[tuple[Any, Any]] = []
        context = multiprocessing.get_context("spawn")
        for number in range(1, processes):
            ours, theirs = context.Pipe()
            work: tuple[object, ...] = (theirs, address, self.prepared, number)
            child = context.Process(target=_serve_orders, args=work, daemon=True)
            child.start()
            theirs.close()  # or a child that dies would leave us waiting for it
            self._children.append((child, ours))
        for _, pipe in self._children:
            _receive(pipe)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for child, pipe in self._children:
            if kind is None:
                with suppress(OSError):  # a client that died
                    pipe.send(None)
            else:
                child.terminate()  # it may be in the middle of a long run
        for child, _ in self._children:
            child.join(5)
        self.target.close()

    def run(self, loop: Loop) -> Records:
        """Sends the loop's requests, shared among the clients, and returns what became of them."""
        start = time.perf_counter() + (_AHEAD_S if self._children else 0.0)
        stride = loop.senders(self.processes)
        for number, (_, pipe) in enumerate(self._children, 1):
            pipe.send((loop.share(number, self.processes), stride, start))
        own = drive(self.target, self.prepared, loop.share(0, self.processes), cycle=(0, stride), start=start)
        return merge([own, *(_receive(pipe) for _, pipe in self._children)])


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise HstuTrtError("a client process of the load died; see its message above") from None


def _serve_orders(pipe: Any, address: Address, prepared: Sequence[Any], number: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that gives the orders ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target = address.open()
    with suppress(EOFError, BrokenPipeError):  # who gives the orders is gone
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            loop, stride, start = order
            pipe.send(drive(target, prepared, loop, cycle=(number, stride), start=start))
    target.close()
