"""Embedding tables of a model folder: written from a checkpoint, and read back as tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import SHARD_TENSOR, read_tables, write_table, write_tables_manifest
from hstu_trt.contract.tensors import Precision, float_dtype
from hstu_trt.contract.text import bytes_text
from hstu_trt.export.checkpoint import TableSource

_ONE_SHARD = 1 << 62
"""Bytes: an ONNX initializer is one piece of one file, so a table is never cut."""

Progress = Callable[[str], None]
"""Is told what happens next, in a few words."""


def write_tables(
    folder: Path,
    tables: Iterable[tuple[TableConfig, TableSource]],
    precision: Precision,
    made_by: str,
    facts: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes a tables folder with one shard per table.

    precision: of the model, which every value must fit. made_by, facts: for the manifest.
    Raises ArtefactError for values that do not fit, and where the disk has no room.
    """
    tables = list(tables)
    _check_disk(folder, [table for table, _ in tables])
    stored = []
    for table, source in tables:
        features = ", ".join(table.features)
        progress(f"writing table {table.name}: {table.rows} x {table.dim} {table.dtype} <- {features}")
        blocks = checked_rows(source.blocks(), table, precision)
        stored.append(write_table(folder, table, blocks, shard_bytes=_ONE_SHARD))
    write_tables_manifest(folder, stored, made_by, facts)


def table_file_bytes(table: TableConfig) -> int:
    """Bytes of a table's rows."""
    return table.rows * table.dim * np.dtype(table.dtype).itemsize


def checked_rows(blocks: Iterable[NDArray], table: TableConfig, precision: Precision) -> Iterator[NDArray]:
    """Passes blocks of rows [n, dim] on.

    Raises ArtefactError at a value that no score survives: NaN, Inf, or one too large for the precision.
    """
    limit = np.finfo(float_dtype(precision)).max
    first = 0
    for block in blocks:
        bad = ~(np.abs(block) <= limit)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise ArtefactError(
                f"table {table.name} holds {block[row, column]} at [{first + row}, {column}], outside {precision}"
            )
        first += len(block)
        yield block


def _check_disk(folder: Path, tables: Iterable[TableConfig]) -> None:
    needed, place = sum(map(table_file_bytes, tables)), folder.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ArtefactError(
            f"the tables need {bytes_text(needed)}, {place.parent} has {bytes_text(free)} free; choose another --out"
            " (with random weights, --table-rows makes a table smaller)"
        )


def table_rows(tables: Path) -> dict[str, Tensor]:
    """The tables of a folder [rows, dim] by name, mapped into memory rather than read."""
    from safetensors import safe_open

    rows = {}
    for name, table in read_tables(tables, regenerate="hstu-trt export ...").items():
        with safe_open(tables / table.shards[0].file, framework="pt") as shard:
            rows[name] = shard.get_tensor(SHARD_TENSOR)
    return rows
