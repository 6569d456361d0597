"""The remote tier: embedding tables in a Redis or Valkey Cluster, looked up by one round trip for all features.

What the cluster does not give within the deadline comes from a local copy of the same version; without one, the policy
of the deployment decides: the request fails, or gets rows of zeros. Every row carries a status that tells.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import RowStatus, range_text, resolve_ids
from hstu_trt.tables.remote_cluster import FOUND, REFUSED, SKIPPED, UNAVAILABLE, Cluster, RemoteRows, RowsJob
from hstu_trt.tables.remote_layout import (
    COMPLETE,
    VERSION_FIELDS,
    RemoteVersion,
    rows_digest,
    table_key,
    version_key,
)
from hstu_trt.tables.remote_resp import RemoteError, text_of
from hstu_trt.tables.remote_values import decode_values

OnFailure = Literal["fail", "default"]


@dataclass(frozen=True)
class _Versions:
    """What every row of one request comes from."""

    tables: Mapping[str, RemoteVersion]
    rows: Mapping[str, RemoteRows]
    local: HostTables | None

    def table_of(self, feature: str) -> RemoteVersion:
        for version in self.tables.values():
            if feature in version.features:
                return version
        known = sorted(feature for version in self.tables.values() for feature in version.features)
        raise ConfigError(f"no remote table for feature {feature!r}; features: {', '.join(known) or 'none'}")


@dataclass
class _Column:
    """The ids of one feature, on their way to rows."""

    version: RemoteVersion
    feature: str | None
    ids: NDArray
    out: NDArray
    status: NDArray
    resolved: NDArray
    """Status of each id before any row is asked for."""
    rejected: int | None
    bad: int
    job: RowsJob


class RemoteTables:
    """Tables of a cluster, each pinned to a version. Threads may share it; a request sees one version of each table."""

    def __init__(
        self,
        cluster: Cluster,
        tables: Sequence[str],
        *,
        versions: Mapping[str, str] | None = None,
        local: Path | None = None,
        on_failure: OnFailure = "fail",
        deadline_ms: float = 15.0,
    ) -> None:
        """Opens tables at ``versions``, those not named there at the version in use.

        local: tables folder with the same rows, for rows that the cluster does not give.
        on_failure: what happens without it: ``fail`` raises RemoteError, ``default`` answers rows of zeros.
        Raises RemoteError, or ArtefactError if the local copy holds other rows.
        """
        self.deadline_ms, self.on_failure = deadline_ms, on_failure
        self._cluster, self._names, self._pinned = cluster, tuple(tables), dict(versions or {})
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()
        self._versions = self._resolve(local)

    @property
    def tables(self) -> Mapping[str, RemoteVersion]:
        """The versions in use."""
        return self._versions.tables

    def refresh(self, local: Path | None = None) -> bool:
        """Moves to the versions now in use, with a local copy of them; true if they are others.

        Requests in progress end with the versions they began with. If this raises, the old ones stay.
        """
        found = self._resolve(local)
        changed = dict(found.tables) != dict(self._versions.tables)
        self._versions = found
        return changed

    def counters(self) -> dict[str, int]:
        """The cluster's counters, and rows_local, rows_default, bad_ids and requests_failed; for metrics."""
        with self._lock:
            own = {name: self._counted[name] for name in ("rows_local", "rows_default", "bad_ids", "requests_failed")}
        return {**self._cluster.counters(), **own}

    def lookup(
        self, table: str, ids: NDArray, options: LookupOptions | None = None, deadline_ms: float | None = None
    ) -> tuple[NDArray, NDArray]:
        """Rows of one table: ids ``[n]`` -> rows ``[n, dim]`` and status ``[n]``; see ``lookup_features``."""
        options, versions = options or LookupOptions(), self._versions
        if table not in versions.tables:
            raise ConfigError(f"no remote table {table!r}; tables: {', '.join(versions.tables) or 'none'}")
        _check_ids(ids, 1, options.what)
        version = versions.tables[table]
        out, status = np.empty((len(ids), version.dim), options.dtype), np.empty(len(ids), np.uint8)
        column = _column(versions, version, None, ids, out, status, options)
        self._fill(versions, [column], options, deadline_ms)
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
        _check_ids(ids, 2, options.what)
        if ids.shape[1] != len(features):
            raise InputError(
                f"tensor {options.what!r} must have {len(features)} columns ({', '.join(features)}), "
                f"got {list(ids.shape)}"
            )
        ends = np.cumsum([0, *(table.dim for table in tables)])
        out, status = np.empty((len(ids), ends[-1]), options.dtype), np.empty((len(features), len(ids)), np.uint8)
        columns = [
            _column(versions, table, feature, ids[:, i], out[:, ends[i] : ends[i + 1]], status[i], options)
            for i, (feature, table) in enumerate(zip(features, tables, strict=True))
        ]
        self._fill(versions, columns, options, deadline_ms)
        return out, status.T

    def _resolve(self, local: Path | None) -> _Versions:
        tables = {name: self._version(name) for name in self._names}
        rows = {name: RemoteRows(version) for name, version in tables.items()}
        return _Versions(tables, rows, None if local is None else open_local(local, tables))

    def _version(self, table: str) -> RemoteVersion:
        name = self._pinned.get(table)
        if name is None:
            replies = self._cluster.execute("HMGET", table_key(table), "current")
            name = text_of(replies[0]) if isinstance(replies, list) else ""
        if not name:
            raise RemoteError(f"table {table!r} has no version in use; publish one: hstu-trt tables push --publish")
        fields = read_fields(self._cluster, table, name)
        if fields.pop(COMPLETE, "") != "1":
            raise RemoteError(f"version {name!r} of table {table!r} is not complete: push it again, it goes on")
        return RemoteVersion.from_fields(table, name, fields)

    def _fill(
        self, versions: _Versions, columns: Sequence[_Column], options: LookupOptions, deadline_ms: float | None
    ) -> None:
        self._count("bad_ids", sum(column.bad for column in columns))
        for column in columns:
            if column.rejected is not None:
                raise InputError(_bad_id(column, columns, options))
        trouble = self._cluster.read([c.job for c in columns], self.deadline_ms if deadline_ms is None else deadline_ms)
        for column in columns:
            if column.job.values is not column.out:
                decode_values(column.version, column.job.values, column.out)
            self._complete(versions, column, options, trouble)

    def _complete(self, versions: _Versions, column: _Column, options: LookupOptions, trouble: str) -> None:
        """Fills in the rows that the cluster did not give, and turns the client's status into RowStatus."""
        status = column.status
        lacking = np.flatnonzero((status != FOUND) & (status != SKIPPED))
        if len(lacking) and versions.local is not None:
            wanted, table = column.ids[lacking], column.version.table
            column.out[lacking] = versions.local.lookup_with_status(table, wanted, options)[0]
            status[lacking] = RowStatus.HOST
            self._count("rows_local", len(lacking))
        elif len(lacking):
            if self.on_failure == "fail":
                self._count("requests_failed", 1)
                raise RemoteError(_lacking(column, lacking, trouble))
            status[status == REFUSED] = RowStatus.MISSING
            self._count("rows_default", len(lacking))
        # A row that is there tells of its id: padding, or a bad one.
        told = (column.resolved != RowStatus.HOST) & (status != RowStatus.UNAVAILABLE) & (status != RowStatus.MISSING)
        status[told] = column.resolved[told]

    def _count(self, name: str, more: int) -> None:
        if more:
            with self._lock:
                self._counted[name] += more


def open_local(folder: Path, tables: Mapping[str, RemoteVersion]) -> HostTables:
    """Opens a local copy. Raises ArtefactError if it lacks a table, or holds other rows than its remote version."""
    local = HostTables.open(folder)
    for name, version in tables.items():
        if name not in local.tables:
            raise ArtefactError(f"{folder} lacks table {name!r}: it is no copy of version {version.version!r}")
        if rows_digest(local.tables[name], local.folder.files) != version.digest:
            raise ArtefactError(f"{folder} holds other rows of table {name!r} than version {version.version!r}")
    return local


def read_fields(cluster: Cluster, table: str, version: str, *more: str) -> dict[str, str]:
    """The fields of a version's description that are there; with ``complete``, and more of them."""
    names = (*VERSION_FIELDS, COMPLETE, *more)
    values = cluster.execute("HMGET", version_key(table, version), *names)
    if not isinstance(values, list):
        raise RemoteError(f"table {table!r}, version {version!r}: HMGET answered {values!r}")
    return {name: text_of(value) for name, value in zip(names, values, strict=True) if value is not None}


def _check_ids(ids: NDArray, ndim: int, what: str) -> None:
    if ids.dtype not in (np.int32, np.int64):
        raise InputError(f"tensor {what!r} must be int64 or int32, got {ids.dtype}")
    if ids.ndim != ndim:
        raise InputError(f"tensor {what!r} must have {ndim} dimensions, got shape {list(ids.shape)}")


def _column(
    versions: _Versions,
    version: RemoteVersion,
    feature: str | None,
    ids: NDArray,
    out: NDArray,
    status: NDArray,
    options: LookupOptions,
) -> _Column:
    ids = ids.astype(np.int64, copy=False)
    found = resolve_ids(ids, version.ids, version.rows, None, options.policy, options.padding_id)
    values = out if version.dtype == options.dtype else np.empty((len(ids), version.value_bytes), np.uint8)
    rows = np.ascontiguousarray(found.rows, np.int64)
    if options.policy == "row0" and version.row0:
        rows = np.where(found.status == RowStatus.BAD_ID, version.row0, rows)
    job = RowsJob(table=versions.rows[version.table], rows=rows, values=values, status=status)
    return _Column(version, feature, ids, out, status, found.status, found.rejected, found.bad, job)


def _bad_id(column: _Column, columns: Sequence[_Column], options: LookupOptions) -> str:
    place = column.rejected or 0
    feature, at = "", f"{place}"
    if column.feature is not None:
        number = next(i for i, other in enumerate(columns) if other is column)
        feature, at = f" (feature {column.feature!r})", f"{place}, {number}"
    about = range_text(column.version.table, column.version.rows)
    return f"tensor {options.what!r}{feature} holds {column.ids[place]} at [{at}]; {about}"


def _lacking(column: _Column, lacking: NDArray, trouble: str) -> str:
    version, status = column.version, column.status[lacking]
    counts = {
        "unavailable": int((status == UNAVAILABLE).sum()),
        "missing": int((status == cast(int, RowStatus.MISSING)).sum()),
        "refused for their length or type": int((status == REFUSED).sum()),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return (
        f"table {version.table!r}, version {version.version!r}: of {len(column.ids)} rows {told}, "
        f"the first of them row {column.job.rows[lacking[0]]}{'; ' + trouble if trouble else ''}"
    )
