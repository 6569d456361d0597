"""A tables folder in float -> the same tables in int8 or fp8, and what that costs in accuracy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import QuantisedRows
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.stored_table import StoredTable, TablesFolder
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.tables.quantisers import dequantise_rows, quantise_rows
from hstu_trt.tables.sources import FilePart

Progress = Callable[[str, int], None]
_BLOCK_BYTES = 2 << 20


@dataclass
class QuantisationError:
    """How far quantised rows are from the rows they were made of."""

    table: str
    squared_error: float = 0.0
    squared_norm: float = 0.0
    max_abs_error: float = 0.0
    worst_row: int = 0
    """The row with the largest error relative to its own norm."""
    worst_row_error: float = 0.0

    @property
    def relative_rmse(self) -> float:
        """Root of the summed squared error over the summed squares of all values."""
        return float(np.sqrt(self.squared_error / self.squared_norm)) if self.squared_norm else 0.0

    def add(self, first_row: int, rows: NDArray, quantised: NDArray) -> None:
        """Takes in rows ``[n, dim]`` from ``first_row`` on, and what was made of them."""
        error = quantised.astype(np.float64) - rows
        row_error, row_norm = (error**2).sum(axis=1), (rows.astype(np.float64) ** 2).sum(axis=1)
        self.squared_error += float(row_error.sum())
        self.squared_norm += float(row_norm.sum())
        self.max_abs_error = max(self.max_abs_error, float(np.abs(error).max(initial=0.0)))
        relative = np.sqrt(row_error / np.where(row_norm > 0, row_norm, 1))
        if relative.size and relative.max() > self.worst_row_error:
            self.worst_row, self.worst_row_error = first_row + int(relative.argmax()), float(relative.max())


def row_parts(folder: Path, table: StoredTable) -> list[FilePart]:
    """The rows of a float table as parts of files."""
    return [
        FilePart(folder / shard.file, shard.payload_offset, shard.rows, table.dim, table.dtype)
        for shard in table.shards
        if shard.rows
    ]


def check_quantisable(tables: Sequence[StoredTable]) -> None:
    """Refuses tables that are quantised already: a second rounding would add its error to the first one's."""
    for table in tables:
        if table.is_quantised:
            raise ConfigError(f"table {table.name} is {table.dtype} already; quantise from its float rows")


def measure_error(folder: Path, table: StoredTable, dtype: str, progress: Progress) -> QuantisationError:
    """Quantises a table and forgets the result."""
    report = QuantisationError(table.name)
    for _ in _quantised_blocks(folder, table, dtype, report, progress):
        pass
    return report


def quantise_tables(
    source: TablesFolder, names: Sequence[str], dtype: str, out: Path, progress: Progress
) -> list[QuantisationError]:
    """Writes ``out`` with the tables ``names`` quantised and the others copied; a report of each quantised one."""
    reports = []
    with staged_folder(out) as part:
        stored = []
        for table in source.tables.values():
            if table.name not in names:
                stored.append(_copy(source.path, part, table))
                continue
            report = QuantisationError(table.name)
            blocks = _quantised_blocks(source.path, table, dtype, report, progress)
            stored.append(_write(source.path, part, table, dtype, blocks))
            reports.append(report)
        facts = {"version": out.name, "pair_id": source.pair_id}
        write_tables_manifest(part, stored, f"hstu-trt tables quantise {source.path}", facts)
    return reports


def _write(source: Path, folder: Path, table: StoredTable, dtype: str, blocks: Iterator[QuantisedRows]) -> StoredTable:
    config = TableConfig(name=table.name, rows=table.rows, dim=table.dim, dtype="float32", features=table.features)
    copy_permutation(source, folder, table)
    return write_table(folder, config, blocks, dtype=dtype, ids=table.ids, row_order=table.row_order)


def _quantised_blocks(
    folder: Path, table: StoredTable, dtype: str, report: QuantisationError, progress: Progress
) -> Iterator[QuantisedRows]:
    step, begin = max(1, _BLOCK_BYTES // (4 * table.dim)), 0
    for part in row_parts(folder, table):
        for first in range(0, part.rows, step):
            rows = part.read(first, min(step, part.rows - first)).astype(np.float32)
            block = quantise_rows(rows, dtype)
            report.add(begin + first, rows, dequantise_rows(block, dtype))
            yield block
            progress(table.name, len(rows) * table.row_bytes)
        begin += part.rows


def _copy(source: Path, folder: Path, table: StoredTable) -> StoredTable:
    for shard in table.shards:
        (folder / shard.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / shard.file, folder / shard.file)
    copy_permutation(source, folder, table)
    return table


def copy_permutation(source: Path, folder: Path, table: StoredTable) -> None:
    """Copies the file that permutes a table's ids, where it has one."""
    if table.ids.row_of_id is not None:
        (folder / table.ids.row_of_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / table.ids.row_of_id, folder / table.ids.row_of_id)
