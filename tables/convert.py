"""Matrices in files -> a tables folder, streamed: never a whole table in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.model import TableConfig, TableDtype
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_format import (
    DEFAULT_SHARD_BYTES,
    TABLES_KIND,
    StoredTable,
    is_table_name,
    write_table,
    write_tables_manifest,
)
from hstu_trt.contract.text import bytes_text
from hstu_trt.tables.sources import MatrixSource, open_matrix

Progress = Callable[[str, int], None]
"""Told a table's name and the bytes of it just written."""


@dataclass(frozen=True)
class PlannedTable:
    """A table to be written, and where its rows come from."""

    config: TableConfig
    source: MatrixSource
    shard_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of all its rows."""
        return self.config.rows * self._row_bytes

    @property
    def shards(self) -> int:
        """Number of files it will fill."""
        return -(-self.config.rows // max(1, self.shard_bytes // self._row_bytes))

    @property
    def _row_bytes(self) -> int:
        return self.config.dim * np.dtype(self.config.dtype).itemsize


def plan(
    sources: Mapping[str, str], features: Mapping[str, Sequence[str]], dtype: TableDtype | None, shard_rows: int | None
) -> list[PlannedTable]:
    """What ``convert`` would write.

    sources: table -> ``FILE[:TENSOR]``; features: table -> its features (default: one, named as the table); dtype: of
    all tables (default: float16 for a float16 source, else float32). Raises ConfigError, InputError, ArtefactError.
    """
    for name in features:
        if name not in sources:
            raise ConfigError(f"features of table {name!r}, but no --table {name}=FILE")
    tables = [_plan_table(name, text, features.get(name, (name,)), dtype, shard_rows) for name, text in sources.items()]
    home: dict[str, str] = {}
    for table in tables:
        for feature in table.config.features:
            if home.setdefault(feature, table.config.name) != table.config.name:
                raise ConfigError(f"feature {feature!r} is in two tables, {home[feature]!r} and {table.config.name!r}")
    return tables


def _plan_table(
    name: str, text: str, features: Sequence[str], dtype: TableDtype | None, shard_rows: int | None
) -> PlannedTable:
    if not is_table_name(name):
        raise ConfigError(f"table name {name!r}: it names a folder, so use letters, digits, '_', '.' and '-'")
    if shard_rows is not None and shard_rows < 1:
        raise ConfigError(f"a shard holds at least one row, got {shard_rows}")
    file, colon, tensor = text.rpartition(".safetensors:")
    source = open_matrix(Path(f"{file}.safetensors"), tensor) if colon else open_matrix(Path(text))
    rows, dim = source.matrix.shape
    chosen: TableDtype = dtype or ("float16" if source.dtype == "float16" else "float32")
    config = TableConfig(name=name, rows=rows, dim=dim, dtype=chosen, features=tuple(features))
    row_bytes = dim * np.dtype(chosen).itemsize
    return PlannedTable(config, source, DEFAULT_SHARD_BYTES if shard_rows is None else shard_rows * row_bytes)


def check_target(out: Path, tables: Sequence[PlannedTable], force: bool) -> None:
    """Refuses to replace anything but a tables folder (and that only with ``force``), or to fill up the disk."""
    if out.exists():
        if not force:
            raise ConfigError(f"{out} exists; --force replaces it")
        try:
            read_document(out, kind=TABLES_KIND, regenerate="")
        except ArtefactError:
            raise ConfigError(f"{out} holds something else than tables; choose another --out") from None
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    needed, free = sum(table.payload_bytes for table in tables), shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(f"{out} needs {bytes_text(needed)}, but {parent} has only {bytes_text(free)} free")


def convert(out: Path, tables: Sequence[PlannedTable], progress: Progress) -> list[StoredTable]:
    """Writes the planned tables to ``out``, which appears (or is replaced) in one step at the end."""
    with staged_folder(out) as part:
        stored = [write_table(part, table.config, _watched(table, progress), table.shard_bytes) for table in tables]
        write_tables_manifest(part, stored, made_by="hstu-trt tables convert", facts={})
    return stored


def _watched(table: PlannedTable, progress: Progress) -> Iterator[NDArray]:
    for block in table.source.blocks(table.config.dtype):
        yield block
        progress(table.config.name, block.nbytes)
