"""The remote tier: embedding tables in a Redis or Valkey Cluster, looked up by one round trip for all features.

What the cluster does not give within the deadline comes from a local copy of the same version; without one, the policy
of the deployment decides: the request fails, or gets the table's default row (a row of zeros under other id policies
than ``default_row``, and where the table has none). Every row carries a status that tells.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.tables.host import HostTables, LookupOptions, check_columns, check_ids
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.remote_cluster import FOUND, REFUSED, SKIPPED, Cluster, RemoteRows, RowsJob
from hstu_trt.tables.remote_columns import Column, bad_id_text, lacking_text, make_column
from hstu_trt.tables.remote_layout import (
    COMPLETE,
    VERSION_FIELDS,
    RemoteVersion,
    digest_field,
    rows_digest,
    table_key,
    version_key,
)
from hstu_trt.tables.remote_resp import NotInClusterError, RemoteError, RowsOutOfReachError, text_of
from hstu_trt.tables.remote_values import decode_values

OnFailure = Literal["fail", "default"]
_HOST = int(RowStatus.HOST)
_DEFAULT_ROW_MS = 1000.0


@dataclass(frozen=True)
class RemoteVersions:
    """What every row of one request comes from."""

    tables: Mapping[str, RemoteVersion]
    rows: Mapping[str, RemoteRows]
    local: HostTables | None
    default_rows: Mapping[str, NDArray]
    """Values uint8 ``[1, value_bytes]`` of the tables that have a default row."""

    def table_of(self, feature: str) -> RemoteVersion:
        for version in self.tables.values():
            if feature in version.features:
                return version
        known = sorted(feature for version in self.tables.values() for feature in version.features)
        raise ConfigError(f"no remote table for feature {feature!r}; features: {', '.join(known) or 'none'}")


class RemoteCounts:
    """What became of requests and rows, over all versions. Threads may share it."""

    NAMES = ("rows_local", "rows_default", "bad_ids", "requests_failed")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()

    def add(self, name: str, more: int) -> None:
        """Adds to one of ``NAMES``."""
        if more:
            with self._lock:
                self._counted[name] += more

    def as_dict(self) -> dict[str, int]:
        """All of them, so far."""
        with self._lock:
            return {name: self._counted[name] for name in self.NAMES}


class RemoteTables:
    """Tables of a cluster, each at one version for good; another version is opened anew. Threads may share it."""

    def __init__(
        self,
        cluster: Cluster,
        tables: Sequence[str],
        *,
        versions: Mapping[str, str] | None = None,
        local: Path | HostTables | None = None,
        on_failure: OnFailure = "fail",
        deadline_ms: float = 15.0,
        counts: RemoteCounts | None = None,
    ) -> None:
        """Opens tables at ``versions``, those not named there at the version that is in use now.

        local: tables with the same rows, open or their folder, for rows that the cluster does not give.
        on_failure: what happens without it: ``fail`` raises RemoteError, ``default`` answers the default row under the
        id policy ``default_row``, and rows of zeros under the others and for a table without one.
        counts: to share with other versions.
        Raises RemoteError, or ArtefactError if the local copy holds other rows.
        """
        self.deadline_ms, self.on_failure = deadline_ms, on_failure
        self._cluster, self._counts = cluster, counts or RemoteCounts()
        self._versions = self._resolve({name: (versions or {}).get(name) for name in tables}, local)

    @property
    def tables(self) -> Mapping[str, RemoteVersion]:
        """The version of each."""
        return self._versions.tables

    def counters(self) -> dict[str, int]:
        """The cluster's counters, and rows_local, rows_default, bad_ids and requests_failed; for metrics."""
        return {**self._cluster.counters(), **self._counts.as_dict()}

    def lookup(
        self, table: str, ids: NDArray, options: LookupOptions | None = None, deadline_ms: float | None = None
    ) -> tuple[NDArray, NDArray]:
        """Rows of one table: ids ``[n]`` -> rows ``[n, dim]`` and status ``[n]``; see ``lookup_features``."""
        options, versions = options or LookupOptions(), self._versions
        if table not in versions.tables:
            raise ConfigError(f"no remote table {table!r}; tables: {', '.join(versions.tables) or 'none'}")
        check_ids(ids, 1, options.what)
        version = versions.tables[table]
        out, status = np.empty((len(ids), version.dim), options.dtype), np.empty(len(ids), np.uint8)
        column = make_column(versions.rows[table], version, ids, out, status, options)
        self.fill([column], deadline_ms)
        return out, status

    def lookup_features(
        self,
        features: Sequence[str],
        ids: NDArray,
        options: LookupOptions | None = None,
        deadline_ms: float | None = None,
    ) -> tuple[NDArray, NDArray]:
        """Rows of several features side by side, by one round trip.

        ids ``[n, features]`` int32 or int64 -> rows ``[n, sum of the tables' dims]`` and status ``[n, features]`` uint8
        (RowStatus). Raises InputError for ids, RemoteError under ``on_failure="fail"``.
        """
        options, versions = options or LookupOptions(), self._versions
        tables = [versions.table_of(feature) for feature in features]
        check_columns(features, ids, options.what)
        ends = np.cumsum([0, *(table.dim for table in tables)])
        out, status = np.empty((len(ids), ends[-1]), options.dtype), np.empty((len(features), len(ids)), np.uint8)
        columns = [
            make_column(versions.rows[t.table], t, ids[:, i], out[:, ends[i] : ends[i + 1]], status[i], options)
            for i, t in enumerate(tables)
        ]
        for number, (column, feature) in enumerate(zip(columns, features, strict=True)):
            column.feature, column.number = feature, number
        self.fill(columns, deadline_ms)
        return out, status.T

    def _resolve(self, wanted: Mapping[str, str | None], local: Path | HostTables | None) -> RemoteVersions:
        tables = {table: self._version(table, name) for table, name in wanted.items()}
        rows = {name: RemoteRows(version) for name, version in tables.items()}
        held = None if local is None else open_local(local, tables)
        defaults = {
            name: self._default_row(version, rows[name], version.ids.default_row)
            for name, version in tables.items()
            if version.ids.default_row is not None
        }
        return RemoteVersions(tables, rows, held, defaults)

    def _default_row(self, version: RemoteVersion, rows: RemoteRows, number: int) -> NDArray:
        values, status = np.empty((1, version.value_bytes), np.uint8), np.zeros(1, np.uint8)
        job = RowsJob(table=rows, rows=np.asarray([number], np.int64), values=values, status=status)
        trouble = self._cluster.read([job], _DEFAULT_ROW_MS)
        if status[0] != FOUND:
            raise RemoteError(
                f"table {version.table!r}, version {version.version!r}: its default row {number} cannot be read "
                f"({trouble or 'the cluster holds no such row'}); push the version again, it goes on"
            )
        return values

    def _version(self, table: str, name: str | None) -> RemoteVersion:
        if name is None:
            replies = self._cluster.execute("HMGET", table_key(table), "current")
            name = text_of(replies[0]) if isinstance(replies, list) else ""
        if not name:
            raise RemoteError(f"table {table!r} has no version in use; publish one: hstu-trt tables push --publish")
        fields = read_fields(self._cluster, table, name)
        if fields.pop(COMPLETE, "") != "1":
            raise RemoteError(f"version {name!r} of table {table!r} is not complete: push it again, it goes on")
        return RemoteVersion.from_fields(table, name, fields)

    def column(self, table: str, ids: NDArray, out: NDArray, status: NDArray, options: LookupOptions) -> Column:
        """Ids ``[n]`` of a table, to be looked up by ``fill``; status ``[n]`` is contiguous, as are rows of ``out``."""
        versions = self._versions
        return make_column(versions.rows[table], versions.tables[table], ids, out, status, options)

    def fill(self, columns: Sequence[Column], deadline_ms: float | None = None) -> None:
        """Fills rows and status of columns by one round trip. Raises InputError, or RemoteError."""
        self._counts.add("bad_ids", sum(column.bad for column in columns))
        for column in columns:
            if column.rejected is not None:
                raise InputError(bad_id_text(column))
        trouble = self._cluster.read([c.job for c in columns], self.deadline_ms if deadline_ms is None else deadline_ms)
        for column in columns:
            if column.job.values is not column.out:
                decode_values(column.version, column.job.values, column.out)
            self._complete(column, trouble)

    def _complete(self, column: Column, trouble: str) -> None:
        """Fills in the rows that the cluster did not give, and turns the client's status into RowStatus."""
        status, options, versions = column.status, column.options, self._versions
        if _are_all(status, FOUND) and _are_all(column.resolved, _HOST):
            return
        lacking = np.flatnonzero((status != FOUND) & (status != SKIPPED))
        if len(lacking) and versions.local is not None:
            wanted, table = column.ids[lacking], column.version.table
            column.out[lacking] = versions.local.lookup_with_status(table, wanted, options)[0]
            status[lacking] = RowStatus.HOST
            self._counts.add("rows_local", len(lacking))
        elif len(lacking):
            if self.on_failure == "fail":
                self._counts.add("requests_failed", 1)
                raise RowsOutOfReachError(lacking_text(column, lacking), trouble)
            status[status == REFUSED] = RowStatus.MISSING
            default_row = versions.default_rows.get(column.version.table)
            if options.policy == "default_row" and default_row is not None:
                row = np.empty((1, column.version.dim), column.out.dtype)
                decode_values(column.version, default_row, row)
                column.out[lacking] = row
            self._counts.add("rows_default", len(lacking))
        # A row that is there tells of its id: padding, or a bad one.
        told = (column.resolved != RowStatus.HOST) & (status != RowStatus.UNAVAILABLE) & (status != RowStatus.MISSING)
        status[told] = column.resolved[told]


def _are_all(status: NDArray, wanted: int) -> bool:
    """Whether uint8 ``[n]`` holds nothing else. Counting bytes costs a fraction of what comparing arrays does."""
    return status.tobytes().count(wanted) == len(status)


def open_local(held: Path | HostTables, tables: Mapping[str, RemoteVersion]) -> HostTables:
    """Opens a local copy. Raises ArtefactError if it lacks a table, or holds other rows than its remote version."""
    local = held if isinstance(held, HostTables) else HostTables.open(held)
    folder = local.folder.path
    for name, version in tables.items():
        if name not in local.tables:
            raise ArtefactError(f"{folder} lacks table {name!r}: it is no copy of version {version.version!r}")
        if rows_digest(local.tables[name], local.folder.files) != version.digest:
            raise ArtefactError(f"{folder} holds other rows of table {name!r} than version {version.version!r}")
    return local


def version_with(cluster: Cluster, table: str, digest: str) -> str:
    """The complete version of a table whose rows have that digest. Raises NotInClusterError, or RemoteError."""
    replies = cluster.execute("HMGET", table_key(table), digest_field(digest), "current")
    names = [text_of(reply) for reply in replies if reply is not None] if isinstance(replies, list) else []
    for name in names:
        fields = read_fields(cluster, table, name)
        if fields.get("digest") == digest and fields.get(COMPLETE) == "1":
            return name
    raise NotInClusterError(f"the cluster holds no complete version of table {table!r} with these rows")


def read_fields(cluster: Cluster, table: str, version: str, *more: str) -> dict[str, str]:
    """The fields of a version's description that are there; with ``complete``, and more of them."""
    names = (*VERSION_FIELDS, COMPLETE, *more)
    values = cluster.execute("HMGET", version_key(table, version), *names)
    if not isinstance(values, list):
        raise RemoteError(f"table {table!r}, version {version!r}: HMGET answered {values!r}")
    return {name: text_of(value) for name, value in zip(names, values, strict=True) if value is not None}
