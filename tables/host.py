"""The host tier: embedding tables mapped into memory, looked up with numpy.

Nothing is read before a lookup touches it, so a table may be larger than the memory. Rows come back exactly as stored;
another output dtype rounds as numpy does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.table_format import Shard, StoredTable, read_tables
from hstu_trt.tables.ids import POLICIES, Policy, range_text

OutputDtype = Literal["float32", "float16"]
REGENERATE = "hstu-trt export, or hstu-trt tables convert --table NAME=FILE --out {folder}"


@dataclass(frozen=True)
class _MappedTable:
    """Shards of a table that hold rows, and the first row of each."""

    shards: tuple[NDArray, ...]
    first_rows: NDArray

    def gather(self, ids: NDArray, out: NDArray) -> None:
        """Copies the rows of ids ``[n]``, all within the table, to ``out`` ``[n, dim]``."""
        if len(self.shards) == 1:
            out[...] = self.shards[0].take(ids, axis=0)
            return
        number = np.searchsorted(self.first_rows, ids, side="right") - 1
        for shard in np.unique(number):
            here = np.flatnonzero(number == shard)
            out[here] = self.shards[shard].take(ids[here] - self.first_rows[shard], axis=0)


class HostTables:
    """The tables of a folder, open for lookups. Threads may share it."""

    def __init__(self, tables: dict[str, StoredTable], mapped: dict[str, _MappedTable]) -> None:
        """Use ``HostTables.open``."""
        self.tables = tables
        self._mapped = mapped
        self._table_of = {feature: table.name for table in tables.values() for feature in table.features}

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> HostTables:
        """Maps the tables of a folder; ``verify`` also re-hashes every shard. Raises ArtefactError."""
        tables = read_tables(folder, regenerate=REGENERATE.format(folder=folder), verify=verify)
        return cls(tables, {name: _map_table(folder, table) for name, table in tables.items()})

    def lookup(
        self,
        table: str,
        ids: NDArray,
        *,
        policy: Policy = "reject",
        padding_id: int | None = None,
        dtype: OutputDtype = "float32",
        what: str = "ids",
    ) -> NDArray:
        """Rows of one table: ids ``[n]`` int32 or int64 -> ``[n, dim]``; see ``lookup_features``."""
        if table not in self.tables:
            raise ConfigError(f"no table {table!r}; tables: {', '.join(self.tables) or 'none'}")
        _check_options(ids, 1, policy, dtype, what)
        stored = self.tables[table]
        out = np.empty((len(ids), stored.dim), dtype)
        bad = self._fill(stored, ids, out, policy, padding_id)
        if bad is not None:
            raise InputError(f"tensor {what!r} holds {ids[bad]} at [{bad}]; {range_text(stored.name, stored.rows)}")
        return out

    def lookup_features(
        self,
        features: Sequence[str],
        ids: NDArray,
        *,
        policy: Policy = "reject",
        padding_id: int | None = None,
        dtype: OutputDtype = "float32",
        what: str = "ids",
    ) -> NDArray:
        """Rows of several features side by side: ids ``[n, features]`` -> ``[n, sum of the tables' dims]``.

        policy: what an id outside its table does: ``reject`` raises InputError naming ``what``, feature, position and
        value; ``clamp`` takes the nearest row; ``zero`` answers a zero row.
        padding_id: this id answers a zero row under every policy.
        """
        tables = [self._stored(feature) for feature in features]
        _check_options(ids, 2, policy, dtype, what)
        if ids.shape[1] != len(features):
            raise InputError(
                f"tensor {what!r} must have {len(features)} columns ({', '.join(features)}), got {list(ids.shape)}"
            )
        ends = np.cumsum([0, *(table.dim for table in tables)])
        out = np.empty((len(ids), ends[-1]), dtype)
        for column, (feature, table) in enumerate(zip(features, tables, strict=True)):
            rows = out[:, ends[column] : ends[column + 1]]
            bad = self._fill(table, ids[:, column], rows, policy, padding_id)
            if bad is not None:
                raise InputError(
                    f"tensor {what!r} (feature {feature!r}) holds {ids[bad, column]} at [{bad}, {column}]; "
                    f"{range_text(table.name, table.rows)}"
                )
        return out

    def _stored(self, feature: str) -> StoredTable:
        if feature not in self._table_of:
            raise ConfigError(f"no table for feature {feature!r}; features: {', '.join(sorted(self._table_of))}")
        return self.tables[self._table_of[feature]]

    def _fill(
        self, table: StoredTable, ids: NDArray, out: NDArray, policy: Policy, padding_id: int | None
    ) -> int | None:
        """Fills ``out`` with the rows of ids ``[n]``; returns the place of the first id to reject, if any."""
        ids = ids.astype(np.int64, copy=False)
        padding = np.zeros(len(ids), bool) if padding_id is None else ids == padding_id
        bad = ((ids < 0) | (ids >= table.rows)) & ~padding
        if bad.any() and (policy == "reject" or (policy == "clamp" and not table.rows)):
            return int(bad.argmax())
        zero = padding if policy == "clamp" else padding | bad
        safe = np.clip(ids, 0, table.rows - 1) if policy == "clamp" else ids
        mapped = self._mapped[table.name]
        if not zero.any():
            mapped.gather(safe, out)
            return None
        rows = np.empty((len(ids) - int(zero.sum()), table.dim), out.dtype)
        mapped.gather(safe[~zero], rows)
        out[~zero], out[zero] = rows, 0
        return None


def _map_table(folder: Path, table: StoredTable) -> _MappedTable:
    shards = [shard for shard in table.shards if shard.rows]
    if not shards:
        return _MappedTable((np.empty((0, table.dim), table.dtype),), np.zeros(1, np.int64))
    return _MappedTable(
        tuple(_map_shard(folder, table, shard) for shard in shards),
        np.asarray([shard.first_row for shard in shards], np.int64),
    )


def _map_shard(folder: Path, table: StoredTable, shard: Shard) -> NDArray:
    """The rows of a shard as a plain array view: memmap's own indexing is slow."""
    return np.asarray(
        np.memmap(folder / shard.file, table.dtype, "r", offset=shard.payload_offset, shape=(shard.rows, table.dim))
    )


def _check_options(ids: NDArray, ndim: int, policy: str, dtype: str, what: str) -> None:
    if ids.dtype not in (np.int32, np.int64):
        raise InputError(f"tensor {what!r} must be int64 or int32, got {ids.dtype}")
    if ids.ndim != ndim:
        raise InputError(f"tensor {what!r} must have {ndim} dimensions, got shape {list(ids.shape)}")
    if policy not in POLICIES:
        raise ConfigError(f"unknown id policy {policy!r}: choose from {', '.join(POLICIES)}")
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"lookups answer float32 or float16, not {dtype!r}")
