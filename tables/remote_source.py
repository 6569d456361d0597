"""Rows of a folder on their way into a cluster: as they are stored, scale and all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.shards import storage_dtype
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.remote_layout import RemoteVersion, default_partitions, rows_digest, value_bytes
from hstu_trt.tables.remote_values import encode_values
from hstu_trt.tables.table_arrays import TableArrays, open_arrays


class RemoteSource:
    """A table of a folder, and the version that it becomes."""

    def __init__(self, folder: Path, table: str, version: str, partitions: int | None = None) -> None:
        """Hashes the folder's files. partitions: of the version; None: as many as suit the table.

        Raises ArtefactError, or ConfigError for a table that is not there.
        """
        folder = current_tables(folder)
        found = read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder), verify=True)
        if table not in found.tables:
            raise ConfigError(f"{folder} has no table {table!r}; tables: {', '.join(found.tables) or 'none'}")
        stored = found.tables[table]
        self._arrays = open_arrays(folder, stored)
        if partitions is None:
            partitions = default_partitions(stored.rows, value_bytes(stored.dtype, stored.dim))
        self.version = RemoteVersion(
            table=table, version=version, rows=stored.rows, dim=stored.dim, dtype=stored.dtype,
            features=tuple(stored.features), partitions=partitions, digest=rows_digest(stored, found.files),
            ids=_remote_rule(self._arrays), row0=_id_of(self._arrays, 0) or 0, pair_id=found.pair_id or "",
        )  # fmt: skip

    def values(self, rows: NDArray) -> NDArray:
        """Row numbers of the version ``[n]`` -> values uint8 ``[n, value_bytes]``."""
        arrays = self._arrays
        stored = rows if arrays.row_of_id is None else arrays.row_of_id[rows].astype(np.int64)
        codes = np.empty((len(rows), arrays.table.dim), storage_dtype(arrays.table.dtype))
        scale = np.empty(len(rows), np.float32) if arrays.table.is_quantised else None
        shard_of = np.searchsorted(arrays.first_rows, stored, side="right") - 1
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            places = stored[here] - arrays.first_rows[shard]
            codes[here] = arrays.values[shard].take(places, axis=0)
            if scale is not None:
                scale[here] = arrays.scales[shard].take(places)
        return encode_values(codes, scale)


def _remote_rule(arrays: TableArrays) -> IdRule:
    """The rule of the version: rows of a permuted table are numbered by their ids."""
    rule = arrays.table.ids
    if arrays.row_of_id is None:
        return rule
    default_row = None if rule.default_row is None else _id_of(arrays, rule.default_row)
    return dataclasses.replace(rule, hash="none", row_of_id=None, default_row=default_row)


def _id_of(arrays: TableArrays, row: int) -> int | None:
    """The number of a stored row in the version; None if no id leads to it."""
    if arrays.row_of_id is None:
        return row
    found = np.flatnonzero(arrays.row_of_id == row)
    return int(found[0]) if len(found) else None
