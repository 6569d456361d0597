"""Matrices in files -> a tables folder, streamed: never a whole table in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.model import TableConfig, TableDtype
from hstu_trt.contract.shards import Block, quantiser_of, storage_dtype, write_vector
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.stored_table import IdRule, StoredTable, is_table_name
from hstu_trt.contract.table_format import DEFAULT_SHARD_BYTES, TABLES_KIND, write_table, write_tables_manifest
from hstu_trt.contract.text import bytes_text
from hstu_trt.tables.quantisers import quantise_rows
from hstu_trt.tables.sources import MatrixSource, is_checkpoint, open_matrix
from hstu_trt.tables.table_arrays import PERMUTATION_TENSOR

Progress = Callable[[str, int], None]
"""Told a table's name and the bytes of it just written."""


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What is wanted of one table."""

    source: str
    """``FILE[:TENSOR]`` or ``CHECKPOINT_DIRECTORY[:TABLE]``."""
    features: tuple[str, ...]
    ids: IdRule = field(default_factory=IdRule)
    rank_by: Path | None = None
    """.npy file of a count per id: rows are stored from the most to the least frequent, and ids permuted."""


@dataclass(frozen=True)
class PlannedTable:
    """A table to be written, and where its rows come from."""

    config: TableConfig
    dtype: str
    """Of the stored rows; the config's dtype where that is a float."""
    source: MatrixSource
    shard_bytes: int
    ids: IdRule
    counts: NDArray | None
    """How often each id was seen, of a table to be ranked."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of all its rows and scales."""
        return self.config.rows * (self._row_bytes + (4 if quantiser_of(self.dtype) else 0))

    @property
    def shards(self) -> int:
        """Number of files it will fill."""
        return -(-self.config.rows // max(1, self.shard_bytes // self._row_bytes))

    @property
    def _row_bytes(self) -> int:
        return self.config.dim * storage_dtype(self.dtype).itemsize


def plan(requests: Mapping[str, TableRequest], dtype: str | None, shard_rows: int | None) -> list[PlannedTable]:
    """What ``convert`` would write.

    dtype: of all tables (default: float16 for a float16 source, else float32).
    Raises ConfigError, InputError, ArtefactError.
    """
    tables = [_plan_table(name, request, dtype, shard_rows) for name, request in requests.items()]
    home: dict[str, str] = {}
    for table in tables:
        for feature in table.config.features:
            if home.setdefault(feature, table.config.name) != table.config.name:
                raise ConfigError(f"feature {feature!r} is in two tables, {home[feature]!r} and {table.config.name!r}")
    return tables


def _plan_table(name: str, request: TableRequest, dtype: str | None, shard_rows: int | None) -> PlannedTable:
    if not is_table_name(name):
        raise ConfigError(f"table name {name!r}: it names a folder, so use letters, digits, '_', '.' and '-'")
    if shard_rows is not None and shard_rows < 1:
        raise ConfigError(f"a shard holds at least one row, got {shard_rows}")
    source = _open_source(name, request.source)
    float_dtype: TableDtype = (
        "float16" if dtype == "float16" or (dtype is None and source.dtype == "float16") else "float32"
    )
    stored = dtype or float_dtype
    config = TableConfig(name=name, rows=source.rows, dim=source.dim, dtype=float_dtype, features=request.features)
    shard_bytes = (
        DEFAULT_SHARD_BYTES if shard_rows is None else shard_rows * source.dim * storage_dtype(stored).itemsize
    )
    if request.ids.default_row is not None and request.ids.default_row >= source.rows:
        raise ConfigError(f"default row {request.ids.default_row} of table {name!r}, which has {source.rows} rows")
    counts = None if request.rank_by is None else _read_counts(request.rank_by, name, source.rows)
    return PlannedTable(config, stored, source, shard_bytes, request.ids, counts)


def _open_source(name: str, text: str) -> MatrixSource:
    folder, _, table = text.rpartition(":")
    if is_checkpoint(Path(text)):
        return open_matrix(Path(text), name)
    if folder and is_checkpoint(Path(folder)):
        return open_matrix(Path(folder), table)
    file, colon, tensor = text.rpartition(".safetensors:")
    return open_matrix(Path(f"{file}.safetensors"), tensor) if colon else open_matrix(Path(text))


def _read_counts(path: Path, name: str, rows: int) -> NDArray:
    try:
        counts: NDArray = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ArtefactError(f"{path} is not a .npy file ({error})") from None
    if counts.shape != (rows,) or counts.dtype.kind not in "iuf":
        raise InputError(f"{path} must hold a count for each of the {rows} ids of {name!r}, got {list(counts.shape)}")
    return counts


def check_target(out: Path, needed: int, force: bool) -> None:
    """Refuses to replace anything but a tables folder (and that only with ``force``), or to fill up the disk.

    needed: bytes that will be written.
    """
    if out.exists():
        if not force:
            raise ConfigError(f"{out} exists; --force replaces it")
        try:
            read_document(out, kind=TABLES_KIND, regenerate="")
        except ArtefactError:
            raise ConfigError(f"{out} holds something else than tables; choose another --out") from None
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(f"{out} needs {bytes_text(needed)}, but {parent} has only {bytes_text(free)} free")


def convert(
    out: Path, tables: Sequence[PlannedTable], progress: Progress, facts: Mapping[str, Any] | None = None
) -> list[StoredTable]:
    """Writes the planned tables to ``out``, which appears (or is replaced) in one step at the end."""
    with staged_folder(out) as part:
        stored = [_write(part, table, progress) for table in tables]
        facts = {"version": out.name, **(facts or {})}
        write_tables_manifest(part, stored, made_by="hstu-trt tables convert", facts=facts)
    return stored


def _write(folder: Path, table: PlannedTable, progress: Progress) -> StoredTable:
    ids, order = table.ids, None
    if table.counts is not None:
        # A stable sort, so that the same counts always give the same rows.
        order = np.argsort(-table.counts.astype(np.float64), kind="stable")
        row_of_id = np.empty(len(order), np.uint32)
        row_of_id[order] = np.arange(len(order), dtype=np.uint32)
        file = f"{table.config.name}/{PERMUTATION_TENSOR}.safetensors"
        write_vector(folder / file, PERMUTATION_TENSOR, row_of_id)
        default_row = None if ids.default_row is None else int(row_of_id[ids.default_row])
        ids = IdRule(hash="permutation", row_of_id=file, default_row=default_row)
    blocks = _stored_blocks(table, order, progress)
    row_order = "identity" if order is None else "rank"
    return write_table(folder, table.config, blocks, table.shard_bytes, dtype=table.dtype, ids=ids, row_order=row_order)  # type: ignore[arg-type]


def _stored_blocks(table: PlannedTable, order: NDArray | None, progress: Progress) -> Iterator[Block]:
    quantised = quantiser_of(table.dtype) is not None
    for block in table.source.blocks("float32" if quantised else table.dtype, order):
        yield quantise_rows(block, table.dtype) if quantised else block
        progress(table.config.name, len(block) * table.config.dim * storage_dtype(table.dtype).itemsize)
