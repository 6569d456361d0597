"""What changed between two versions of a tables folder, as a small folder; and the way back to the whole version.

    delta/
      manifest.json                 kind "tables delta": digests of both versions, sha256 of each file
      item_id/00000.safetensors     rows as they are in the new version, and "row_number" int64 [n], ascending

A row counts as changed if any bit of it or of its scale differs; rows behind the old version's last are new. Applying a
delta writes the new version bit by bit: its shards must have the sha256 of the original.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import (
    MANIFEST_NAME,
    json_digest,
    read_document,
    read_manifest,
    write_manifest,
    write_text_atomically,
)
from hstu_trt.contract.shards import (
    Block,
    QuantisedRows,
    ShardWriter,
    quantiser_of,
    read_shard_header,
    shard_layout,
    storage_dtype,
    write_shard,
)
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.stored_table import StoredTable, TablesFolder, is_table_name
from hstu_trt.contract.table_format import TABLES_KIND, parse_tables, read_tables_folder
from hstu_trt.contract.table_versions import DELTA_KIND
from hstu_trt.tables.quantise import copy_permutation
from hstu_trt.tables.table_arrays import TableArrays, map_file, open_arrays, read_rows

MAKE = "hstu-trt tables delta make OLD NEW --out {folder}"
ROW_NUMBER = "row_number"
_COLUMNS = {ROW_NUMBER: "I64"}
_BLOCK_BYTES = 16 << 20

Progress = Callable[[str, int], None]


def tables_digest(folder: Path) -> str:
    """Digest of all that a tables folder answers: schema and content of every table, not its version's name."""
    document = read_document(folder, kind=TABLES_KIND, regenerate="hstu-trt tables convert")
    return json_digest({"tables": document.get("tables"), "files": document.get("files")})


@dataclass(frozen=True)
class ChangedRows:
    """The changed rows of a table in a delta."""

    rows: Block
    numbers: NDArray
    """``[n]`` int64, ascending."""


def check_compatible(old: TablesFolder, new: TablesFolder) -> None:
    """Refuses versions of which one is not the other with changed and further rows. Raises ConfigError."""
    if list(old.tables) != list(new.tables):
        raise ConfigError(f"{old.path} has the tables {list(old.tables)}, {new.path} {list(new.tables)}")
    for before, after in zip(old.tables.values(), new.tables.values(), strict=True):
        for what in ("dim", "dtype", "features", "ids", "row_order"):
            if getattr(before, what) != getattr(after, what):
                raise ConfigError(
                    f"table {before.name}: {what} is {getattr(before, what)} in {old.path}, "
                    f"{getattr(after, what)} in {new.path}; a delta changes rows only"
                )
        if after.rows < before.rows or (after.rows > before.rows and before.ids.hash != "none"):
            raise ConfigError(
                f"table {before.name} goes from {before.rows} to {after.rows} rows; "
                "a delta cannot remove rows, nor add some where ids are hashed"
            )
        file = before.ids.row_of_id
        if file is not None and old.files[file]["sha256"] != new.files.get(file, {}).get("sha256"):
            raise ConfigError(f"table {before.name}: ids are permuted otherwise in {new.path}")


def make_delta(old: TablesFolder, new: TablesFolder, out: Path, progress: Progress) -> dict[str, int]:
    """Writes the delta from ``old`` to ``new``; table -> number of changed rows."""
    check_compatible(old, new)
    changed: dict[str, int] = {}
    with staged_folder(out) as part:
        files = []
        for name, table in new.tables.items():
            file = f"{name}/00000.safetensors"
            before, after = open_arrays(old.path, old.tables[name]), open_arrays(new.path, table)
            changed[name] = _write_changed(part / file, before, after, progress)
            files.append(file)
        result = read_document(new.path, kind=TABLES_KIND, regenerate="")
        facts = {"base": tables_digest(old.path), "base_version": old.version, "changed": changed, "result": result}
        write_manifest(part, kind=DELTA_KIND, made_by=MAKE.format(folder=out), files=files, facts=facts)
    return changed


def _write_changed(path: Path, before: TableArrays, after: TableArrays, progress: Progress) -> int:
    table, numbers = after.table, [np.empty(0, np.int64)]
    with ShardWriter(path, table.dtype, table.dim) as shard:
        for block in _changed_blocks(before, after, progress):
            shard.add(block.rows)
            numbers.append(block.numbers)
        shard.add_column(ROW_NUMBER, np.concatenate(numbers))
    return shard.rows


def changed_rows(before: TableArrays, after: TableArrays, most_bytes: int) -> ChangedRows:
    """The changed rows in memory. Raises ArtefactError beyond ``most_bytes`` of them."""
    table, size = after.table, 0
    blocks = []
    for block in _changed_blocks(before, after, lambda name, done: None):
        size += len(block.numbers) * (table.row_bytes + 4 * table.is_quantised)
        if size > most_bytes:
            raise ArtefactError(
                f"table {table.name}: more than {most_bytes} bytes of its rows changed, too many for an overlay; "
                "raise the memory budget for two versions"
            )
        blocks.append(block)
    numbers = np.concatenate([np.empty(0, np.int64), *(block.numbers for block in blocks)])
    values = [np.empty((0, table.dim), storage_dtype(table.dtype))]
    scales = [np.empty(0, np.float32)]
    for block in blocks:
        if isinstance(block.rows, QuantisedRows):
            scales.append(block.rows.scale)
        values.append(block.rows.values if isinstance(block.rows, QuantisedRows) else block.rows)
    rows = np.concatenate(values)
    return ChangedRows(QuantisedRows(rows, np.concatenate(scales)) if table.is_quantised else rows, numbers)


def _changed_blocks(before: TableArrays, after: TableArrays, progress: Progress) -> Iterator[ChangedRows]:
    table = after.table
    for first, count in _steps(0, table.rows, table.row_bytes):
        new = read_rows(after, first, count)
        kept = min(count, max(0, before.table.rows - first))
        differs = np.ones(count, bool)
        differs[:kept] = _differs(read_rows(before, first, kept), new[:kept])
        where = np.flatnonzero(differs)
        rows = QuantisedRows(new.values[where], new.scale[where]) if isinstance(new, QuantisedRows) else new[where]
        yield ChangedRows(rows, first + where)
        progress(table.name, count * table.row_bytes)


def _differs(a: Block, b: Block) -> NDArray:
    """Which rows differ in a bit."""
    if isinstance(a, QuantisedRows) and isinstance(b, QuantisedRows):
        return (a.values != b.values).any(axis=1) | (a.scale.view(np.uint32) != b.scale.view(np.uint32))
    assert isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.asarray((a.view(bits) != b.view(bits)).any(axis=1))


def _steps(first: int, end: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_BYTES // row_bytes)
    for at in range(first, end, step):
        yield at, min(step, end - at)


@dataclass(frozen=True)
class DeltaFolder:
    """A delta whose files have been checked."""

    path: Path
    base: str
    """``tables_digest`` of the version that it leads on from."""
    base_version: str | None
    result: Mapping[str, Any]
    """Manifest of the version that it leads to."""
    files: frozenset[str]

    @property
    def digest(self) -> str:
        """``tables_digest`` of the result."""
        return json_digest({"tables": self.result.get("tables"), "files": self.result.get("files")})

    def target(self, base: TablesFolder) -> TablesFolder:
        """The version it leads to from ``base``. Raises ArtefactError, or ConfigError for tables of another form."""
        target = parse_tables(dict(self.result), self.path, MAKE.format(folder=self.path))
        check_compatible(base, target)
        _check_names(self.path, target, self.files)
        return target

    def changed(self, before: StoredTable, after: StoredTable) -> ChangedRows:
        """The changed rows of a table, mapped. Raises ArtefactError."""
        return read_changed(self.path / after.name / "00000.safetensors", before, after)


def read_delta(delta: Path, *, verify: bool = True) -> DeltaFolder:
    """Reads a delta and checks its files (with sha256 unless ``verify`` is off). Raises ArtefactError."""
    document = read_manifest(delta, kind=DELTA_KIND, regenerate=MAKE.format(folder=delta), verify=verify)
    base, version, result = document.get("base"), document.get("base_version"), document.get("result")
    if not isinstance(result, dict) or not isinstance(base, str) or not isinstance(version, str | None):
        raise ArtefactError(f"{delta}: its result is {result!r}; make it again with: {MAKE.format(folder=delta)}")
    return DeltaFolder(delta, base, version, result, frozenset(document["files"]))


def apply_delta(base: TablesFolder, delta: Path, out: Path, progress: Progress) -> TablesFolder:
    """Writes the new version that a delta leads to. Raises ArtefactError on a damaged or foreign delta."""
    found = read_delta(delta)
    if found.base != tables_digest(base.path):
        raise ArtefactError(
            f"{delta} leads on from version {found.base_version!r} ({found.base[:12]}), "
            f"{base.path} is {base.version!r} ({tables_digest(base.path)[:12]})"
        )
    target = found.target(base)
    with staged_folder(out) as part:
        for name, table in target.tables.items():
            changed = found.changed(base.tables[name], table)
            before = open_arrays(base.path, base.tables[name])
            copy_permutation(base.path, part, table)
            for shard in table.shards:
                blocks = _merged(before, changed, shard.first_row, shard.first_row + shard.rows, progress)
                write_shard(part / shard.file, table.dtype, table.dim, blocks)
        write_text_atomically(part / MANIFEST_NAME, json.dumps({**found.result, "version": out.name}, indent=1) + "\n")
        # The sha256 of each shard is the original's: the result is the new version, bit by bit.
        read_tables_folder(part, regenerate=MAKE.format(folder=delta), verify=True)
    return read_tables_folder(out, regenerate=MAKE.format(folder=delta))


def _check_names(delta: Path, target: TablesFolder, listed: Collection[str]) -> None:
    """Refuses names that lead out of a folder, and rows that no sha256 vouches for."""
    for name, table in target.tables.items():
        files = [f"{name}/{number:05d}.safetensors" for number in range(len(table.shards))]
        if not is_table_name(name) or [shard.file for shard in table.shards] != files:
            raise ArtefactError(f"{delta}: table {name!r} has shards that are not its own")
        ends = [0, *itertools.accumulate(shard.rows for shard in table.shards)]
        if [shard.first_row for shard in table.shards] != ends[:-1] or ends[-1] != table.rows:
            raise ArtefactError(f"{delta}: the shards of table {name!r} do not add up to its {table.rows} rows")
        file = f"{name}/00000.safetensors"
        if file not in listed or not (delta / file).resolve().is_relative_to(delta.resolve()):
            raise ArtefactError(f"{delta}: {file} is not among the manifest's files, or leads outside of the folder")


def read_changed(path: Path, before: StoredTable, after: StoredTable) -> ChangedRows:
    """Maps the changed rows of a table. Raises ArtefactError where they do not lead from the one to the other."""
    dtype, count, dim, payload = read_shard_header(path, _COLUMNS)
    if (dtype, dim) != (after.dtype, after.dim):
        raise ArtefactError(
            f"{path} holds {dtype} rows of width {dim}, table {after.name} {after.dtype} of {after.dim}"
        )
    layout = shard_layout(dtype, dim, count, _COLUMNS)

    def column(name: str, kind: str, shape: tuple[int, ...]) -> NDArray:
        at = payload + layout[name]["data_offsets"][0]
        return map_file(path, at, shape, np.dtype(kind)) if count else np.empty(shape, kind)

    numbers = column(ROW_NUMBER, "int64", (count,))
    if after.rows - before.rows > count:
        raise ArtefactError(f"{path} lacks some of the new rows {before.rows} to {after.rows - 1}")
    further = np.arange(before.rows, after.rows)
    if (np.diff(numbers) <= 0).any() or (count and not 0 <= numbers[0] <= numbers[-1] < after.rows):
        raise ArtefactError(f"{path}: its row numbers do not rise from 0 to {after.rows - 1}")
    if not np.array_equal(numbers[len(numbers) - len(further) :], further):
        raise ArtefactError(f"{path} lacks some of the new rows {before.rows} to {after.rows - 1}")
    values = column("rows", str(storage_dtype(dtype)), (count, dim))
    if quantiser_of(dtype):
        return ChangedRows(QuantisedRows(values, column("scale", "float32", (count,))), numbers)
    return ChangedRows(values, numbers)


def _merged(before: TableArrays, changed: ChangedRows, first: int, end: int, progress: Progress) -> Iterator[Block]:
    """Rows [first, end) of the new version."""
    table = before.table
    for at, count in _steps(first, end, table.row_bytes):
        kept = min(count, max(0, table.rows - at))
        old = read_rows(before, at, kept)
        low, high = np.searchsorted(changed.numbers, [at, at + count])
        place, rows = changed.numbers[low:high] - at, changed.rows[slice(low, high)]
        if isinstance(old, QuantisedRows) and isinstance(rows, QuantisedRows):
            yield QuantisedRows(
                _overlaid(old.values, count, place, rows.values), _overlaid(old.scale, count, place, rows.scale)
            )
        else:
            yield _overlaid(old, count, place, rows)  # type: ignore[arg-type]
        progress(table.name, count * table.row_bytes)


def _overlaid(old: NDArray, count: int, place: NDArray, rows: NDArray) -> NDArray:
    merged = np.empty((count, *old.shape[1:]), old.dtype)
    merged[: len(old)] = old
    merged[place] = rows
    return merged
