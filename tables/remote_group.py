"""Remote tables of equal settings, as a version of tables holds them: also while their cluster is out of reach."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.tables.gather import Outcome
from hstu_trt.tables.host import HostTables, LookupOptions, OutputDtype
from hstu_trt.tables.ids import Policy
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_columns import Column
from hstu_trt.tables.remote_resp import NotInClusterError, RemoteError

RETRY_S = 2.0
_LEAST_MS = 0.001
_began: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def one_deadline() -> Iterator[None]:
    """All remote lookups in the block share their deadline, which begins now, or with an outer block."""
    token = None if _began.get() is not None else _began.set(time.monotonic())
    try:
        yield
    finally:
        if token is not None:
            _began.reset(token)


def fill(tables: RemoteTables, columns: Sequence[Column]) -> None:
    """Fills columns by one round trip, in what is left of the deadline. Raises RemoteError."""
    began = _began.get()
    spent_ms = 0.0 if began is None else (time.monotonic() - began) * 1e3
    tables.fill(columns, max(_LEAST_MS, tables.deadline_ms - spent_ms))


class RemoteGroup:
    """Tables that share connections and round trips. Threads may share it."""

    def __init__(self, open_tables: Callable[[], RemoteTables], local: HostTables | None) -> None:
        """local: the copy of all rows, if there is one; it serves until the cluster does."""
        self._open, self.local = open_tables, local
        self.tables: RemoteTables | None = None

    def connect(self) -> bool:
        """Opens the tables; false if the cluster is out of reach and there is a local copy.

        Raises RemoteError, or ArtefactError for a local copy of other rows.
        """
        try:
            self.tables = self._open()
        except NotInClusterError:
            raise
        except RemoteError:
            if self.local is None:
                raise
        return self.tables is not None


class Reconnecting:
    """Tries groups again whose cluster was out of reach, until they are there or nobody holds them any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[weakref.ref[RemoteGroup]] = []
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def add(self, group: RemoteGroup) -> None:
        """Takes on a group."""
        with self._lock:
            self._waiting.append(weakref.ref(group))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reconnecting", daemon=True)
                self._thread.start()

    @property
    def waiting(self) -> int:
        """Groups whose cluster is not there yet."""
        with self._lock:
            return sum(ref() is not None for ref in self._waiting)

    def close(self) -> None:
        """Ends the attempts; waits for one in progress."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self._closed.wait(RETRY_S):
            with self._lock:
                waiting = self._waiting
            left = [ref for ref in waiting if not _is_settled(ref())]
            with self._lock:
                self._waiting = left + self._waiting[len(waiting) :]
                if not self._waiting:
                    self._thread = None
                    return


def _is_settled(group: RemoteGroup | None) -> bool:
    try:
        return group is None or group.connect()
    except HstuTrtError:
        return False  # the rows may be pushed yet; the local copy has them


class RemoteGather:
    """A remote table behind the interface of one that is here; a round trip of its own per lookup."""

    def __init__(self, table: str, group: RemoteGroup) -> None:
        self._table, self._group = table, group

    def lookup(self, ids: NDArray, out: NDArray, status: NDArray, policy: Policy, padding_id: int | None) -> Outcome:
        """See ``NumpyGather.lookup``. Raises RemoteError."""
        tables = self._group.tables
        if tables is None:
            assert self._group.local is not None
            return self._group.local.gathers[self._table].lookup(ids, out, status, policy, padding_id)
        dtype: OutputDtype = "float16" if out.dtype == np.float16 else "float32"
        options = LookupOptions(policy=policy, padding_id=padding_id, dtype=dtype)
        told = np.empty(len(ids), np.uint8)
        column = tables.column(self._table, ids, out, told, options)
        if column.rejected is None:
            fill(tables, [column])
            status[...] = told
        return Outcome(column.bad, column.rejected)
