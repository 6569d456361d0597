"""The rows of a table as arrays: mapped from its shards, or read into memory of huge pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.shards import Block, QuantisedRows, map_vector, storage_dtype
from hstu_trt.contract.stored_table import StoredTable

PERMUTATION_TENSOR = "row_of_id"

ReadFile = Callable[[Path, int, tuple[int, ...], np.dtype], NDArray]
"""(file, byte offset, shape, dtype) -> its content."""


@dataclass(frozen=True)
class TableArrays:
    """Shards of a table that hold rows."""

    table: StoredTable
    values: tuple[NDArray, ...]
    """Per shard ``[n, dim]`` in the dtype of storage."""
    scales: tuple[NDArray, ...]
    """Per shard ``[n]`` float32; empty unless the table is quantised."""
    first_rows: NDArray
    """``[shards]`` int64."""
    row_of_id: NDArray | None
    """``[ids]`` uint32 of a permutation."""


def map_file(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """A part of a file as a plain array view (memmap's own indexing is slow); nothing is read before it is touched."""
    return np.asarray(np.memmap(path, dtype, "r", offset=offset, shape=shape))


def read_file(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """A part of a file, read."""
    return np.fromfile(path, dtype, int(np.prod(shape)), offset=offset).reshape(shape)


def open_arrays(folder: Path, table: StoredTable, read: ReadFile = map_file) -> TableArrays:
    """Opens the shards of a table. Raises ArtefactError."""
    shards = [shard for shard in table.shards if shard.rows]
    stored = storage_dtype(table.dtype)
    values = [read(folder / s.file, s.payload_offset, (s.rows, table.dim), stored) for s in shards]
    scales: list[NDArray] = []
    if table.is_quantised:
        scales = [read(folder / s.file, table.scale_offset(s), (s.rows,), np.dtype(np.float32)) for s in shards]
    row_of_id = None
    if table.ids.row_of_id is not None:
        row_of_id = map_vector(folder / table.ids.row_of_id, PERMUTATION_TENSOR, "uint32")
        if len(row_of_id) != table.rows:
            raise ArtefactError(
                f"{folder / table.ids.row_of_id} permutes {len(row_of_id)} ids, "
                f"table {table.name} has {table.rows} rows"
            )
    first_rows = np.asarray([shard.first_row for shard in shards], np.int64)
    return TableArrays(table, tuple(values), tuple(scales), first_rows, row_of_id)


def write_rows(arrays: TableArrays, numbers: NDArray, values: NDArray, scales: NDArray | None) -> None:
    """Overwrites rows of arrays in memory.

    numbers ``[n]`` int64, rising; values ``[n, dim]`` as stored; scales ``[n]`` float32 of a quantised table.
    """
    ends = np.searchsorted(numbers, [*arrays.first_rows[1:], arrays.table.rows])
    first = 0
    for shard, end in enumerate(ends):
        here = numbers[first:end] - arrays.first_rows[shard]
        arrays.values[shard][here] = values[first:end]
        if scales is not None:
            arrays.scales[shard][here] = scales[first:end]
        first = end


def read_rows(arrays: TableArrays, first: int, count: int) -> Block:
    """A copy of consecutive rows ``[count, dim]`` as they are stored, from whichever shards they lie in."""
    table = arrays.table
    values = _copy_range(
        arrays.values, arrays.first_rows, first, np.empty((count, table.dim), storage_dtype(table.dtype))
    )
    if not table.is_quantised:
        return values
    return QuantisedRows(values, _copy_range(arrays.scales, arrays.first_rows, first, np.empty(count, np.float32)))


def _copy_range(shards: Sequence[NDArray], first_rows: NDArray, first: int, out: NDArray) -> NDArray:
    for begin, shard in zip(first_rows, shards, strict=True):
        low, high = max(first, begin), min(first + len(out), begin + len(shard))
        if low < high:
            out[low - first : high - first] = shard[low - begin : high - begin]
    return out
