"""The embedding table format: safetensors shards (``shards.py``) and a manifest.

    tables/
      manifest.json                 kind "tables": schema of each table, sha256 of each shard
      item_id/00000.safetensors     its first rows
      item_id/00001.safetensors     the next rows
      item_id/row_of_id.safetensors uint32 [rows]: only where ids are permuted

Several versions of such a folder may stand side by side (``table_versions.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_manifest, write_manifest
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import (
    PAYLOAD_ALIGNMENT,
    SHARD_TENSOR,
    STORED_DTYPES,
    Block,
    QuantisedRows,
    quantiser_of,
    read_safetensors_header,
    read_shard_header,
    storage_dtype,
    whole_number,
    write_shard,
)
from hstu_trt.contract.stored_table import IdRule, RowOrder, Shard, StoredTable, TablesFolder, is_table_name

__all__ = [
    "PAYLOAD_ALIGNMENT", "SHARD_TENSOR", "TABLES_KIND", "IdRule", "QuantisedRows", "Shard", "StoredTable",
    "TablesFolder", "is_table_name", "parse_tables", "read_safetensors_header", "read_shard_header", "read_tables",
    "read_tables_folder", "write_shard", "write_table", "write_tables_manifest",
]  # fmt: skip

TABLES_KIND = "tables"
DEFAULT_SHARD_BYTES = 16 << 30


def write_table(
    folder: Path,
    config: TableConfig,
    blocks: Iterable[Block],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    dtype: str | None = None,
    ids: IdRule | None = None,
    row_order: RowOrder = "identity",
) -> StoredTable:
    """Writes a table from blocks of consecutive rows ``[n, dim]``, cutting shards of at most ``shard_bytes``.

    dtype: of the stored rows, where it is not the config's.
    """
    if not is_table_name(config.name):
        raise ConfigError(f"table name {config.name!r}: it names a folder, so use letters, digits, '_', '.' and '-'")
    dtype = dtype or config.dtype
    limit = max(1, shard_bytes // (config.dim * storage_dtype(dtype).itemsize))
    shards: list[Shard] = []
    first = 0
    for number, part in enumerate(_cut(blocks, limit)):
        file = f"{config.name}/{number:05d}.safetensors"
        rows = write_shard(folder / file, dtype, config.dim, part)
        shards.append(Shard(file, first, rows, PAYLOAD_ALIGNMENT))
        first += rows
    if first != config.rows:
        raise ArtefactError(f"table {config.name}: {first} rows were given, {config.rows} announced")
    return StoredTable(
        config.name, config.rows, config.dim, dtype, config.features, tuple(shards), ids or IdRule(), row_order
    )


def _cut(blocks: Iterable[Block], limit: int) -> Iterator[Iterator[Block]]:
    """Regroups blocks into runs of at most ``limit`` rows; each run must be consumed before the next."""
    rest: list[Block] = []
    source = (block for block in blocks if len(block))

    def run() -> Iterator[Block]:
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


def write_tables_manifest(folder: Path, tables: Iterable[StoredTable], made_by: str, facts: Mapping[str, Any]) -> Path:
    """Writes the manifest of a tables folder; facts may hold its ``version`` and ``pair_id``."""
    tables = list(tables)
    files = [shard.file for table in tables for shard in table.shards]
    files += [table.ids.row_of_id for table in tables if table.ids.row_of_id is not None]
    described = {table.name: _described(table) for table in tables}
    return write_manifest(folder, kind=TABLES_KIND, made_by=made_by, files=files, facts={**facts, "tables": described})


def _described(table: StoredTable) -> dict[str, Any]:
    """The manifest's entry; a plain table has none of the optional keys."""
    entry: dict[str, Any] = {
        "rows": table.rows,
        "dim": table.dim,
        "dtype": table.dtype,
        "features": list(table.features),
        "shards": [[s.file, s.first_row, s.rows, s.payload_offset] for s in table.shards],
    }
    if table.is_quantised:
        entry["quantiser"] = quantiser_of(table.dtype)
    if table.ids.hash != "none":
        entry["hash"] = {"kind": table.ids.hash}
        entry["hash"] |= {"seed": table.ids.seed} if table.ids.hash == "splitmix64" else {"file": table.ids.row_of_id}
    if table.ids.default_row is not None:
        entry["default_row"] = table.ids.default_row
    if table.row_order != "identity":
        entry["row_order"] = table.row_order
    return entry


def read_tables(folder: Path, *, regenerate: str, verify: bool = False) -> dict[str, StoredTable]:
    """The tables of ``read_tables_folder`` by name."""
    return read_tables_folder(folder, regenerate=regenerate, verify=verify).tables


def read_tables_folder(
    folder: Path, *, regenerate: str, verify: bool = False, may_lack: Callable[[str], bool] = lambda table: False
) -> TablesFolder:
    """Reads a tables folder's manifest and checks it against the shards' headers (and sha256, with ``verify``).

    may_lack: tells the tables whose files (those in the folder of their name) need not be there, since their rows are
    elsewhere.
    Raises ArtefactError.
    """
    document = read_manifest(
        folder,
        kind=TABLES_KIND,
        regenerate=regenerate,
        verify=verify,
        may_lack=lambda file: may_lack(file.partition("/")[0]),
    )
    found = parse_tables(document, folder, regenerate)
    for table in found.tables.values():
        if not may_lack(table.name) or all((folder / file).exists() for file in _files_of(table)):
            _check_files(folder, table, set(found.files))
    return found


def _files_of(table: StoredTable) -> list[str]:
    return [shard.file for shard in table.shards] + [file for file in (table.ids.row_of_id,) if file is not None]


def parse_tables(document: Mapping[str, Any], folder: Path, regenerate: str) -> TablesFolder:
    """What a manifest says, none of the folder's files being looked at. Raises ArtefactError."""
    try:
        tables = [_stored_table(name, entry) for name, entry in document["tables"].items()]
        version, pair_id = (_text_or_none(document, key) for key in ("version", "pair_id"))
        files = {str(name): {**entry, "sha256": str(entry["sha256"])} for name, entry in document["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtefactError(f"{folder}: the manifest's tables are malformed ({error}); {regenerate}") from None
    _check_features(folder, tables)
    return TablesFolder(folder, {table.name: table for table in tables}, files, version, pair_id)


def _text_or_none(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a text, got {value!r}")
    return value


_KNOWN_KEYS = {"rows", "dim", "dtype", "features", "shards", "quantiser", "hash", "default_row", "row_order"}


def _stored_table(name: str, entry: dict[str, Any]) -> StoredTable:
    features, dtype = entry["features"], entry["dtype"]
    if unknown := set(entry) - _KNOWN_KEYS:
        # An option that is passed over might mean other rows.
        raise ValueError(f"table {name!r}: unknown key {min(unknown)!r}")
    if dtype not in STORED_DTYPES:
        raise ValueError(f"table {name!r}: dtype must be one of {', '.join(STORED_DTYPES)}, got {dtype!r}")
    if entry.get("quantiser") != quantiser_of(dtype):
        raise ValueError(f"table {name!r}: quantiser {entry.get('quantiser')!r}, {quantiser_of(dtype)!r} for {dtype}")
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise ValueError(f"table {name!r}: features must be a list of names, got {features!r}")
    shards = tuple(
        Shard(
            str(file), whole_number("first_row", first, 0), whole_number("rows", rows, 0), whole_number("offset", at, 8)
        )
        for file, first, rows, at in entry["shards"]
    )
    rows, row_order = whole_number("rows", entry["rows"], 0), entry.get("row_order", "identity")
    if row_order not in get_args(RowOrder):
        raise ValueError(f"table {name!r}: row_order must be {' or '.join(get_args(RowOrder))}, got {row_order!r}")
    ids = _id_rule(name, entry, rows)
    return StoredTable(name, rows, whole_number("dim", entry["dim"], 1), dtype, tuple(features), shards, ids, row_order)


def _id_rule(name: str, entry: dict[str, Any], rows: int) -> IdRule:
    stored = entry.get("hash", {"kind": "none"})
    if unknown := set(stored) - {"kind", "seed", "file"}:
        raise ValueError(f"table {name!r}: unknown key {min(unknown)!r} of its hash")
    default_row = entry.get("default_row")
    if default_row is not None and whole_number("default_row", default_row, 0) >= rows:
        raise ValueError(f"table {name!r}: default_row is {default_row}, it has {rows} rows")
    file = stored.get("file")
    if file is not None and not isinstance(file, str):
        raise ValueError(f"table {name!r}: the file of its hash must be a path, got {file!r}")
    return IdRule(hash=stored["kind"], seed=stored.get("seed", 0), row_of_id=file, default_row=default_row)


def _check_features(folder: Path, tables: Iterable[StoredTable]) -> None:
    home: dict[str, str] = {}
    for table in tables:
        for feature in table.features:
            if home.setdefault(feature, table.name) != table.name:
                raise ArtefactError(
                    f"{folder}: feature {feature!r} looks up in two tables, {home[feature]!r} and {table.name!r}"
                )


def _check_files(folder: Path, table: StoredTable, listed: set[str]) -> None:
    """Holds a table against the headers of its shards, and refuses files outside the folder."""
    for file in _files_of(table):
        if file not in listed:
            raise ArtefactError(f"{folder}: shard {file} is not among the manifest's files")
        if not (folder / file).resolve().is_relative_to(folder.resolve()):
            raise ArtefactError(f"{folder}: {file} is a link that leads outside of the folder")
    expected_first = 0
    for shard in table.shards:
        found = read_shard_header(folder / shard.file)
        if found != (table.dtype, shard.rows, table.dim, shard.payload_offset) or shard.first_row != expected_first:
            raise ArtefactError(
                f"{folder / shard.file} holds {found[1]} x {found[2]} {found[0]} rows, "
                f"the manifest says {shard.rows} x {table.dim} {table.dtype} from row {shard.first_row}"
            )
        expected_first += shard.rows
    if expected_first != table.rows:
        raise ArtefactError(f"{folder}: table {table.name} has {expected_first} rows, the manifest says {table.rows}")
