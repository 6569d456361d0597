"""The embedding table format, version 1: safetensors shards and a manifest.

    tables/
      manifest.json                 kind "tables": schema of each table, sha256 of each shard
      item_id/00000.safetensors     one tensor "rows" [rows of the shard, dim], payload aligned to 4096 bytes
      item_id/00001.safetensors     the next rows

Shards hold consecutive rows. The aligned payload lets a reader map a shard into memory, and lets an ONNX file name it
as external data.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_manifest, write_manifest
from hstu_trt.contract.model import TableConfig

TABLES_KIND = "tables"
SHARD_TENSOR = "rows"
PAYLOAD_ALIGNMENT = 4096
DEFAULT_SHARD_BYTES = 16 << 30
_MAX_HEADER_BYTES = 1 << 20

_SAFETENSORS_NAMES = {"float16": "F16", "float32": "F32"}
_NUMPY_NAMES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a table in one file."""

    file: str
    """Path relative to the tables folder."""
    first_row: int
    rows: int
    payload_offset: int
    """Byte offset of row ``first_row`` in the file."""


@dataclass(frozen=True)
class StoredTable:
    """A table as its manifest describes it."""

    name: str
    rows: int
    dim: int
    dtype: str
    features: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * np.dtype(self.dtype).itemsize


def write_shard(path: Path, dtype: str, dim: int, blocks: Iterable[NDArray]) -> int:
    """Writes blocks of rows ``[n, dim]`` as one shard and returns its row count; holds one block at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with path.open("wb") as stream:
        stream.write(_header(dtype, dim, 0))
        for block in blocks:
            if block.ndim != 2 or block.shape[1] != dim:
                raise ArtefactError(
                    f"{path}: a block of rows has shape {list(block.shape)}, the table's width is {dim}"
                )
            stream.write(np.ascontiguousarray(block, dtype=dtype).data)
            rows += block.shape[0]
        stream.seek(0)
        stream.write(_header(dtype, dim, rows))
    return rows


def _header(dtype: str, dim: int, rows: int) -> bytes:
    end = rows * dim * np.dtype(dtype).itemsize
    entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": [rows, dim], "data_offsets": [0, end]}
    text = json.dumps({SHARD_TENSOR: entry}).encode()
    return struct.pack("<Q", PAYLOAD_ALIGNMENT - 8) + text.ljust(PAYLOAD_ALIGNMENT - 8)


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns (tensor name -> entry, byte offset of the payload). Raises ArtefactError unless it is a header."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            document = json.loads(stream.read(length))
        if not isinstance(document, dict):
            raise TypeError(f"its header is a {type(document).__name__}")
    except (struct.error, ValueError, TypeError, RecursionError, OSError) as error:
        raise ArtefactError(f"{path} is not a safetensors file ({type(error).__name__}: {error})") from None
    return document, 8 + length


def read_shard_header(path: Path) -> tuple[str, int, int, int]:
    """Returns (dtype, rows, dim, payload offset) of a shard. Raises ArtefactError on anything unexpected."""
    document, payload = read_safetensors_header(path)
    try:
        entry = document[SHARD_TENSOR]
        dtype, (rows, dim), (start, end) = _NUMPY_NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        _whole("rows", rows, 0)
        _whole("dim", dim, 1)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is not a table shard ({type(error).__name__}: {error})") from None
    size, expected = path.stat().st_size, rows * dim * np.dtype(dtype).itemsize
    if start != 0 or end != expected or payload + expected != size:
        raise ArtefactError(
            f"{path} is damaged: {size} bytes, {payload + expected} expected for [{rows}, {dim}] {dtype}"
        )
    if payload % PAYLOAD_ALIGNMENT:
        raise ArtefactError(f"{path}: its rows begin at byte {payload}, not at a multiple of {PAYLOAD_ALIGNMENT}")
    return dtype, rows, dim, payload


def _whole(what: str, value: Any, least: int) -> int:
    """``value`` if it is a JSON integer of at least ``least``; raises ValueError."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} must be an integer >= {least}, got {value!r}")
    return value


def is_table_name(name: str) -> bool:
    """Whether a table may bear this name: it is also the name of a folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def write_table(
    folder: Path, config: TableConfig, blocks: Iterable[NDArray], shard_bytes: int = DEFAULT_SHARD_BYTES
) -> StoredTable:
    """Writes a table from blocks of consecutive rows ``[n, dim]``, cutting shards of at most ``shard_bytes``."""
    if not is_table_name(config.name):
        raise ConfigError(f"table name {config.name!r}: it names a folder, so use letters, digits, '_', '.' and '-'")
    limit = max(1, shard_bytes // (config.dim * np.dtype(config.dtype).itemsize))
    shards: list[Shard] = []
    first = 0
    for number, part in enumerate(_cut(blocks, limit)):
        file = f"{config.name}/{number:05d}.safetensors"
        rows = write_shard(folder / file, config.dtype, config.dim, part)
        shards.append(Shard(file, first, rows, PAYLOAD_ALIGNMENT))
        first += rows
    if first != config.rows:
        raise ArtefactError(f"table {config.name}: {first} rows were given, {config.rows} announced")
    return StoredTable(config.name, config.rows, config.dim, config.dtype, config.features, tuple(shards))


def _cut(blocks: Iterable[NDArray], limit: int) -> Iterator[Iterator[NDArray]]:
    """Regroups blocks into runs of at most ``limit`` rows; each run must be consumed before the next."""
    rest: list[NDArray] = []
    source = (block for block in blocks if len(block))

    def run() -> Iterator[NDArray]:
        room = limit
        while room:
            block = rest.pop() if rest else next(source, None)
            if block is None:
                return
            if len(block) > room:
                rest.append(block[room:])
            yield block[:room]
            room -= min(room, len(block))

    while True:
        if not rest:
            block = next(source, None)
            if block is None:
                return
            rest.append(block)
        yield run()


def write_tables_manifest(folder: Path, tables: Iterable[StoredTable], made_by: str, facts: dict[str, Any]) -> Path:
    """Writes the manifest of a tables folder; see ``read_tables``."""
    tables = list(tables)
    described = {
        table.name: {
            "rows": table.rows,
            "dim": table.dim,
            "dtype": table.dtype,
            "features": list(table.features),
            "shards": [[s.file, s.first_row, s.rows, s.payload_offset] for s in table.shards],
        }
        for table in tables
    }
    files = [shard.file for table in tables for shard in table.shards]
    return write_manifest(folder, kind=TABLES_KIND, made_by=made_by, files=files, facts={**facts, "tables": described})


def read_tables(folder: Path, *, regenerate: str, verify: bool = False) -> dict[str, StoredTable]:
    """Reads a tables folder's manifest and checks it against the shards' headers (and sha256, with ``verify``)."""
    document = read_manifest(folder, kind=TABLES_KIND, regenerate=regenerate, verify=verify)
    try:
        tables = [_stored_table(name, entry) for name, entry in document["tables"].items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{folder}: the manifest's tables are malformed ({error}); {regenerate}") from None
    _check_features(folder, tables)
    for table in tables:
        _check_shards(folder, table, set(document["files"]))
    return {table.name: table for table in tables}


def _stored_table(name: str, entry: dict[str, Any]) -> StoredTable:
    features, dtype = entry["features"], entry["dtype"]
    if dtype not in _SAFETENSORS_NAMES:
        raise ValueError(f"table {name!r}: dtype must be one of {', '.join(_SAFETENSORS_NAMES)}, got {dtype!r}")
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise ValueError(f"table {name!r}: features must be a list of names, got {features!r}")
    shards = tuple(
        Shard(str(file), _whole("first_row", first, 0), _whole("rows", rows, 0), _whole("payload_offset", at, 8))
        for file, first, rows, at in entry["shards"]
    )
    return StoredTable(
        name, _whole("rows", entry["rows"], 0), _whole("dim", entry["dim"], 1), dtype, tuple(features), shards
    )


def _check_features(folder: Path, tables: Iterable[StoredTable]) -> None:
    home: dict[str, str] = {}
    for table in tables:
        for feature in table.features:
            if home.setdefault(feature, table.name) != table.name:
                raise ArtefactError(
                    f"{folder}: feature {feature!r} looks up in two tables, {home[feature]!r} and {table.name!r}"
                )


def _check_shards(folder: Path, table: StoredTable, listed: set[str]) -> None:
    expected_first = 0
    for shard in table.shards:
        if shard.file not in listed:
            raise ArtefactError(f"{folder}: shard {shard.file} is not among the manifest's files")
        found = read_shard_header(folder / shard.file)
        if found != (table.dtype, shard.rows, table.dim, shard.payload_offset) or shard.first_row != expected_first:
            raise ArtefactError(
                f"{folder / shard.file} holds {found[1]} x {found[2]} {found[0]} rows, "
                f"the manifest says {shard.rows} x {table.dim} {table.dtype} from row {shard.first_row}"
            )
        expected_first += shard.rows
    if expected_first != table.rows:
        raise ArtefactError(f"{folder}: table {table.name} has {expected_first} rows, the manifest says {table.rows}")
