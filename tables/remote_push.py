"""Bringing a version of a table into a cluster: push, verify, publish, retire.

Rows go block by block in their order, and the version's description records how far it has come, so that an interrupted
push goes on where it stopped. Every row is read back before the version counts as complete. Writing a row twice is
harmless: a version's rows never change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import GateError
from hstu_trt.tables.remote import read_fields
from hstu_trt.tables.remote_cluster import FOUND, UNAVAILABLE, Cluster, RemoteRows, RowsJob
from hstu_trt.tables.remote_layout import COMPLETE, PUSHED, RETIRED, RemoteVersion, digest_field, table_key
from hstu_trt.tables.remote_resp import RemoteError, text_of
from hstu_trt.tables.remote_source import RemoteSource

_BLOCK_BYTES = 4 << 20
_BLOCK_DEADLINE_MS = 5000.0
_RETRY_S = 30.0
"""How long a block is tried again: longer than a failover takes."""

Progress = Callable[[str, int], None]
"""Told a name and the bytes done since the last call."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    version: RemoteVersion
    rows_written: int
    rows_verified: int


class Push:
    """One table of a folder, to be pushed as a version."""

    def __init__(self, cluster: Cluster, folder: Path, table: str, version: str, partitions: int | None = None) -> None:
        """Hashes the folder's shards. partitions: of the version; None: as many as suit the table.

        Raises ArtefactError, or ConfigError for another table or version name.
        """
        self._cluster = cluster
        self._source = RemoteSource(folder, table, version, partitions)
        self.version = self._source.version
        self._rows = RemoteRows(self.version)
        self.block_rows = max(1, _BLOCK_BYTES // self.version.value_bytes)

    def run(self, progress: Progress = lambda what, size: None) -> Pushed:
        """Writes what is not there yet, then reads every row back.

        Raises RemoteError if the cluster fails for long, or holds another version of that name; GateError if a row
        comes back otherwise than it was written. Calling it again goes on.
        """
        first = self._begin()
        for start in range(first, self.version.rows, self.block_rows):
            rows = self._block(start)
            self._write(rows)
            self._note(PUSHED, str(int(rows[-1]) + 1))
            progress("written", len(rows) * self.version.value_bytes)
        self._verify(progress)
        self._note(COMPLETE, "1")
        self._execute("HSET", table_key(self.version.table), digest_field(self.version.digest), self.version.version)
        return Pushed(self.version, max(0, self.version.rows - first), self.version.rows)

    def _begin(self) -> int:
        """Records the description; returns the first row to write."""
        version = self.version
        found = read_fields(self._cluster, version.table, version.version, PUSHED, RETIRED)
        described = {name: text for name, text in found.items() if name not in (PUSHED, COMPLETE, RETIRED)}
        if described and described != version.fields():
            other = ", ".join(n for n, text in version.fields().items() if described.get(n) != text)
            raise RemoteError(
                f"the cluster holds another version {version.version!r} of table {version.table!r} (it differs in "
                f"{other}); versions never change: push under another name"
            )
        if RETIRED in found:
            self._unretire()
        fields = [part for pair in version.fields().items() for part in pair]
        self._execute("HSET", version.key, *fields)
        self._execute("HSET", table_key(version.table), f"version:{version.version}", str(int(time.time())))
        return int(found.get(PUSHED, "0"))

    def _unretire(self) -> None:
        """Writing to a key does not stop its expiry."""
        for key in keys_of(self.version):
            self._execute("PERSIST", key)
        self._execute("HDEL", self.version.key, RETIRED)

    def _block(self, start: int) -> NDArray:
        return np.arange(start, min(start + self.block_rows, self.version.rows), dtype=np.int64)

    def _write(self, rows: NDArray) -> None:
        values, give_up = self._source.values(rows), time.monotonic() + _RETRY_S
        while len(rows):
            status = np.zeros(len(rows), np.uint8)
            job = RowsJob(table=self._rows, rows=rows, values=values, status=status)
            trouble = self._cluster.write(job, _BLOCK_DEADLINE_MS)
            left = status != FOUND
            rows, values = rows[left], values[left]
            if len(rows) and time.monotonic() > give_up:
                raise RemoteError(
                    f"table {self.version.table!r}: row {rows[0]} and {len(rows) - 1} more could not be written "
                    f"({trouble}); push again to go on"
                )
            if len(rows):
                time.sleep(0.2)

    def _verify(self, progress: Progress) -> None:
        """Reads every row back; the first wrong one is where the next push begins."""
        for start in range(0, self.version.rows, self.block_rows):
            rows = self._block(start)
            expected = self._source.values(rows)
            found, status, trouble = self._read(rows, np.empty_like(expected))
            wrong = (status != FOUND) | (found != expected).any(axis=1)
            if wrong.any():
                self._note(PUSHED, str(int(rows[wrong.argmax()])))
                raise GateError(
                    f"table {self.version.table!r}, version {self.version.version!r}: row {rows[wrong.argmax()]} and "
                    f"{int(wrong.sum()) - 1} more of this block differ from the folder's"
                    f"{' (' + trouble + ')' if trouble else ''}; push again to write them again"
                )
            progress("verified", len(rows) * self.version.value_bytes)

    def _read(self, rows: NDArray, values: NDArray) -> tuple[NDArray, NDArray, str]:
        give_up = time.monotonic() + _RETRY_S
        while True:
            status = np.zeros(len(rows), np.uint8)
            job = RowsJob(table=self._rows, rows=rows, values=values, status=status)
            trouble = self._cluster.read([job], _BLOCK_DEADLINE_MS)
            if not (status == UNAVAILABLE).any() or time.monotonic() > give_up:
                return values, status, trouble
            time.sleep(0.2)

    def _note(self, field: str, value: str) -> None:
        self._execute("HSET", self.version.key, field, value)

    def _execute(self, *parts: str) -> None:
        give_up = time.monotonic() + _RETRY_S
        while True:
            try:
                self._cluster.execute(*parts, deadline_ms=_BLOCK_DEADLINE_MS)
                return
            except RemoteError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.2)


def publish(cluster: Cluster, table: str, version: str) -> str:
    """Makes a complete version the one in use; returns the one before, or "". Raises RemoteError."""
    if read_fields(cluster, table, version).get(COMPLETE) != "1":
        raise RemoteError(f"version {version!r} of table {table!r} is not complete: push it first")
    before = cluster.execute("HMGET", table_key(table), "current")
    cluster.execute("HSET", table_key(table), "current", version)
    return text_of(before[0]) if isinstance(before, list) else ""


def keys_of(version: RemoteVersion) -> list[str]:
    """The partitions' keys, then the description's, which is to outlive them."""
    return [*(version.partition_key(partition) for partition in range(version.partitions)), version.key]


def retire(cluster: Cluster, table: str, version: str, after_s: int) -> int:
    """Lets a version expire in ``after_s`` seconds; returns its number of keys. Pushing it again undoes that.

    Raises RemoteError if it is the cluster's version in use. Servers follow the rows of their tables folder instead,
    and nobody knows of them here: a version whose folder is still served must not be retired.
    """
    current = cluster.execute("HMGET", table_key(table), "current")
    if isinstance(current, list) and text_of(current[0]) == version:
        raise RemoteError(f"version {version!r} of table {table!r} is in use: publish another one first")
    described = RemoteVersion.from_fields(table, version, read_fields(cluster, table, version))
    # First nobody may find it, nor a push believe that it has come to an end; else its rows go under whoever did.
    named = cluster.execute("HMGET", table_key(table), digest_field(described.digest))
    if isinstance(named, list) and text_of(named[0]) == version:
        cluster.execute("HDEL", table_key(table), digest_field(described.digest))
    cluster.execute("HSET", described.key, RETIRED, "1")
    cluster.execute("HDEL", described.key, COMPLETE, PUSHED)
    keys = keys_of(described)
    for key in keys:
        # A description that is gone while rows expire would be pushed anew onto them.
        cluster.execute("EXPIRE", key, str(after_s + (key == described.key)))
    cluster.execute("HDEL", table_key(table), f"version:{version}")
    return len(keys)
