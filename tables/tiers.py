"""Tables whose rows come from where a deployment says: mapped files, huge pages, a cluster, or several of these.

``Tiers`` opens a version for the settings; what it opens is a ``HostTables`` whose tables differ in where their rows
lie, so that lookups, overlays and refreshes treat all tiers alike. Remote rows are those of the folder's version and of
no other: the version in the cluster is found by the digest of the rows that the folder's manifest names.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.tables.gather import NumpyGather, RowGather
from hstu_trt.tables.host import REGENERATE, HostTables, LookupOptions, check_columns
from hstu_trt.tables.native import NativeGather, library_if_built
from hstu_trt.tables.remote import RemoteCounts, RemoteTables, version_with
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_columns import Column
from hstu_trt.tables.remote_group import Reconnecting, RemoteGather, RemoteGroup, fill, one_deadline
from hstu_trt.tables.remote_layout import rows_digest
from hstu_trt.tables.remote_resp import NotInClusterError, RemoteError
from hstu_trt.tables.row_source import RowSource
from hstu_trt.tables.table_arrays import map_file, open_arrays, read_file
from hstu_trt.tables.tier_settings import Remote, TierSettings


@dataclass(frozen=True, kw_only=True)
class IdsPart:
    """One ids tensor of a request."""

    features: Sequence[str]
    ids: NDArray
    """``[n, features]`` int32 or int64."""
    options: LookupOptions


def lookup_parts(rows: RowSource, parts: Sequence[IdsPart]) -> list[tuple[NDArray, NDArray]]:
    """Rows and status of each part, see ``RowSource``; remote rows of all parts come by one round trip."""
    if isinstance(rows, TieredTables):
        return rows.lookup_parts(parts)
    return [rows.lookup_features_with_status(part.features, part.ids, part.options) for part in parts]


class Tiers:
    """Opens tables for the settings of a deployment, and holds the connections that versions share."""

    def __init__(self, settings: TierSettings) -> None:
        self.settings = settings
        self._clusters: dict[ClusterOptions, Cluster] = {}
        self._lock = threading.Lock()
        self._reconnecting = Reconnecting()
        self._counts = RemoteCounts()

    def open_tables(self, folder: Path) -> HostTables:
        """Opens the tables of one version. Raises ArtefactError, ConfigError, or RemoteError for a cluster.

        A cluster out of reach is no error where all its rows are in local copies: these serve until it is there.
        """
        folder = current_tables(folder)
        found = self.read_folder(folder)
        library = library_if_built()
        gathers: dict[str, RowGather] = {}
        for name, table in found.tables.items():
            tier = self.settings.of(name)
            if not tier.needs_files:
                continue
            read = map_file if tier.tier != "resident" else read_file if library is None else library.read_file
            arrays = open_arrays(folder, table, read)
            gathers[name] = NumpyGather(arrays) if library is None else NativeGather(arrays, library)
        remotes = self._open_remotes(found, HostTables(found, dict(gathers)))
        return HostTables(found, gathers) if not remotes else TieredTables(found, gathers, remotes)

    def read_folder(self, folder: Path, *, verify: bool = False) -> TablesFolder:
        """Reads a folder; it may lack the files of tables without a local copy. Raises ArtefactError or ConfigError."""
        regenerate = REGENERATE.format(folder=folder)
        found = read_tables_folder(folder, regenerate=regenerate, verify=verify, may_lack=self.may_lack_files)
        self.settings.check_names(found.tables)
        return found

    def may_lack_files(self, table: str) -> bool:
        """Whether the files of a table need not be there."""
        return not self.settings.of(table).needs_files

    def memory_of(self, folder: TablesFolder) -> int:
        """Bytes of memory that ``open_tables`` takes: those of resident tables."""
        tables = folder.tables.items()
        return sum(table.payload_bytes for name, table in tables if self.settings.of(name).tier == "resident")

    def remote_versions(self, found: TablesFolder, *, need_all: bool = True) -> dict[str, str]:
        """table -> the version in its cluster that holds the rows of the folder. Raises ConfigError or RemoteError.

        need_all: also where there is a local copy; else a cluster out of reach leaves out its tables.
        """
        versions = {}
        for name in found.tables:
            remote = self.settings.of(name).remote
            if remote is None:
                continue
            try:
                versions[name] = _pinned(self._cluster(remote), found, name, remote)
            except NotInClusterError:
                raise
            except RemoteError:
                if need_all or not remote.local_copy:
                    raise
        return versions

    @property
    def has_remotes(self) -> bool:
        """Whether any table may be remote."""
        return any(tier.remote is not None for tier in (self.settings.default, *self.settings.tables.values()))

    def counters(self) -> dict[str, int]:
        """What clients of all clusters count, and what became of rows and requests, of all versions."""
        total = Counter(self._counts.as_dict())
        for cluster in self._connected():
            total.update(cluster.counters())
        return dict(total)

    def troubles(self) -> dict[str, int]:
        """``breakers_open``: nodes that are passed over; ``without_cluster``: groups of tables that await theirs."""
        opened = sum(sum(cluster.breakers().values()) for cluster in self._connected())
        return {"breakers_open": opened, "without_cluster": self._reconnecting.waiting}

    def _connected(self) -> list[Cluster]:
        with self._lock:
            return list(self._clusters.values())

    def close(self) -> None:
        """Ends the connections; no lookup may be in progress."""
        self._reconnecting.close()
        for cluster in self._clusters.values():
            cluster.close()
        self._clusters = {}

    def _open_remotes(self, found: TablesFolder, local: HostTables) -> dict[str, RemoteGroup]:
        """table -> the group that it shares with the tables of equal settings."""
        groups: dict[Remote, list[str]] = {}
        for name in found.tables:
            remote = self.settings.of(name).remote
            if remote is not None:
                groups.setdefault(remote, []).append(name)
        opened: dict[str, RemoteGroup] = {}
        for remote, names in groups.items():
            copy = local if remote.local_copy else None
            group = RemoteGroup(partial(self._open_remote, found, names, remote, copy), copy)
            if not group.connect():
                self._reconnecting.add(group)
            opened.update(dict.fromkeys(names, group))
        return opened

    def _open_remote(
        self, found: TablesFolder, names: Sequence[str], remote: Remote, local: HostTables | None
    ) -> RemoteTables:
        cluster = self._cluster(remote)
        return RemoteTables(
            cluster,
            names,
            versions={name: _pinned(cluster, found, name, remote) for name in names},
            local=local,
            on_failure=remote.on_failure,
            deadline_ms=remote.deadline_ms,
            counts=self._counts,
        )

    def _cluster(self, remote: Remote) -> Cluster:
        options = remote.cluster_options()
        with self._lock:
            if options not in self._clusters:
                self._clusters[options] = Cluster(options)
            return self._clusters[options]


def _pinned(cluster: Cluster, found: TablesFolder, table: str, remote: Remote) -> str:
    digest = rows_digest(found.tables[table], found.files)
    try:
        return version_with(cluster, table, digest)
    except NotInClusterError as error:
        raise NotInClusterError(
            f"{error}; push them where {found.path} is whole: hstu-trt tables push {found.path} "
            f"--cluster {','.join(remote.nodes)} --table {table} --version NAME"
        ) from None


class TieredTables(HostTables):
    """The tables of one version, of which some are remote."""

    def __init__(
        self, folder: TablesFolder, gathers: Mapping[str, RowGather], remotes: Mapping[str, RemoteGroup]
    ) -> None:
        """gathers: of tables whose rows are here; remotes: of the others, and of those whose local copy is here."""
        super().__init__(folder, {**gathers, **{name: RemoteGather(name, group) for name, group in remotes.items()}})
        self._remotes = remotes

    def with_gathers(self, folder: TablesFolder, gathers: Mapping[str, RowGather]) -> TieredTables:
        """See ``HostTables``; tables that an overlay lies over leave the common round trip."""
        kept = {name: group for name, group in self._remotes.items() if gathers[name] is self.gathers[name]}
        return TieredTables(folder, gathers, kept)

    def lookup_features_with_status(
        self, features: Sequence[str], ids: NDArray, options: LookupOptions
    ) -> tuple[NDArray, NDArray]:
        """See ``HostTables``; remote columns come by one round trip. Raises RemoteError too."""
        (answer,) = self.lookup_parts([IdsPart(features=features, ids=ids, options=options)])
        return answer

    def lookup_parts(self, parts: Sequence[IdsPart]) -> list[tuple[NDArray, NDArray]]:
        """Rows and status of each part; columns whose rows are here first, then all remote ones together.

        Whatever takes a round trip of its own, as overlays over remote rows do, has the same deadline's end.
        """
        with one_deadline():
            return self._lookup_parts(parts)

    def _lookup_parts(self, parts: Sequence[IdsPart]) -> list[tuple[NDArray, NDArray]]:
        answers, remote = [], list[tuple[RemoteTables, Column]]()
        for part in parts:
            tables = self._tables_of(part)
            ends = np.cumsum([0, *(self.tables[table].dim for table in tables)])
            out = np.empty((len(part.ids), ends[-1]), part.options.dtype)
            status = np.empty((len(tables), len(part.ids)), np.uint8)
            for number, table in enumerate(tables):
                rows, ids = out[:, ends[number] : ends[number + 1]], part.ids[:, number]
                group = self._remotes.get(table)
                source = None if group is None else group.tables
                if source is None:
                    feature, stored = part.features[number], self.tables[table]
                    self._fill_column(feature, stored, part.ids, number, rows, status[number], part.options)
                    continue
                column = source.column(table, ids, rows, status[number], part.options)
                column.feature, column.number = part.features[number], number
                self._count_bad(table, column.bad)
                remote.append((source, column))
            answers.append((out, status.T))
        _fill_together(remote)
        return answers

    def _tables_of(self, part: IdsPart) -> list[str]:
        check_columns(part.features, part.ids, part.options.what)
        return [self._stored(feature).name for feature in part.features]

    def _count_bad(self, table: str, bad: int) -> None:
        if bad:
            with self._lock:
                self.bad_ids[table] += bad


def _fill_together(remote: Sequence[tuple[RemoteTables, Column]]) -> None:
    """One round trip for the columns of each group of tables."""
    while remote:
        tables = remote[0][0]
        fill(tables, [column for other, column in remote if other is tables])
        remote = [item for item in remote if item[0] is not tables]
