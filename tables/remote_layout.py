"""How tables lie in a cluster: keys, fields and values. The C++ client (``csrc/remote/rows.cpp``) agrees.

    e:{item_id}          hash: current -> the version in use; version:<v> -> when its push began; digest:<d> -> the
                         complete version with these rows
    e:{item_id:v7}       hash: the description of version v7 (RemoteVersion), and how far its push has come
    e:{item_id:v7:255}   hash: row number, 8 bytes little endian -> the row's bytes, and its scale if it is quantised

Rows are numbered as in the folder they come from; those of a permuted table by their ids, so that readers need no
permutation. Row r lies in partition splitmix64(r) & (partitions - 1). A partition is one key, so that it is read by one
HMGET, and moves from node to node as a whole. A version's rows never change once it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import json_digest
from hstu_trt.contract.shards import STORED_DTYPES, quantiser_of, storage_dtype
from hstu_trt.contract.stored_table import HashKind, IdRule, StoredTable, is_table_name
from hstu_trt.tables.remote_resp import RemoteError

LAYOUT = 1
LEAST_PARTITIONS = 64
MOST_PARTITIONS = 1 << 14
PARTITION_BYTES = 128 << 20
_NUMBERS = ("layout", "rows", "dim", "partitions")
VERSION_FIELDS = (*_NUMBERS, "dtype", "digest", "features", "hash", "seed", "default_row", "row0", "pair_id")
SCALE_BYTES = 4
PUSHED = "pushed"
"""Rows that have arrived, from row 0 on."""
COMPLETE = "complete"
RETIRED = "retired"
"""Its keys expire: it is no longer complete, and a push of it begins anew."""


@dataclass(frozen=True, kw_only=True)
class RemoteVersion:
    """One version of a table."""

    table: str
    version: str
    rows: int
    dim: int
    dtype: str
    """Of the stored rows: ``float32``, ``float16``, ``int8`` or ``float8_e4m3fn``."""
    features: tuple[str, ...]
    partitions: int
    digest: str
    """Of the rows: sha256 over the shards' sha256; equal to a local copy's if both hold the same rows."""
    ids: IdRule = field(default_factory=IdRule)
    """How an id becomes a row: ``none`` or ``splitmix64``."""
    row0: int = 0
    """The row that the policy ``row0`` answers: the folder's first one."""
    pair_id: str = ""
    """Digest of the dense weights that the table was trained with; "": unknown."""

    def __post_init__(self) -> None:
        for what, name in (("table", self.table), ("version", self.version)):
            if not is_table_name(name):
                raise ConfigError(f"{what} {name!r}: it is part of a key, so use letters, digits, '_', '.' and '-'")
        if self.partitions < 1 or self.partitions & (self.partitions - 1):
            raise ConfigError(f"{self.partitions} partitions: use a power of two")

    @property
    def is_quantised(self) -> bool:
        """Whether a float32 scale follows each row."""
        return quantiser_of(self.dtype) is not None

    @property
    def value_bytes(self) -> int:
        """Bytes of a row with its scale."""
        return value_bytes(self.dtype, self.dim)

    @property
    def key_prefix(self) -> str:
        """What the keys of the partitions begin with."""
        return f"e:{{{self.table}:{self.version}"

    @property
    def key(self) -> str:
        """The key of the description."""
        return version_key(self.table, self.version)

    def partition_key(self, partition: int) -> str:
        return f"{self.key_prefix}:{partition}}}"

    def fields(self) -> dict[str, str]:
        """The description as fields of a hash."""
        numbers = {"layout": LAYOUT, "rows": self.rows, "dim": self.dim, "partitions": self.partitions}
        return {
            **{name: str(number) for name, number in numbers.items()},
            "dtype": self.dtype,
            "digest": self.digest,
            "features": json.dumps(self.features),
            "hash": self.ids.hash,
            "seed": str(self.ids.seed),
            "default_row": "" if self.ids.default_row is None else str(self.ids.default_row),
            "row0": str(self.row0),
            "pair_id": self.pair_id,
        }

    @classmethod
    def from_fields(cls, table: str, version: str, fields: Mapping[str, str]) -> RemoteVersion:
        """The description in a cluster. Raises RemoteError if there is none, or none that this code knows."""
        try:
            layout, rows, dim, partitions = (int(fields[name]) for name in _NUMBERS)
            features = json.loads(fields["features"])
            if layout != LAYOUT or fields["dtype"] not in STORED_DTYPES:
                raise ValueError("another layout")
            if rows < 0 or dim < 1 or not isinstance(features, list):
                raise ValueError("out of range")
            return cls(
                table=table, version=version, rows=rows, dim=dim, dtype=fields["dtype"],
                features=tuple(map(str, features)), partitions=partitions, digest=fields["digest"],
                ids=_id_rule(fields, rows), row0=int(fields["row0"]), pair_id=fields["pair_id"],
            )  # fmt: skip
        except (KeyError, ValueError, ConfigError) as error:
            raise RemoteError(
                f"table {table!r} has no version {version!r} in the cluster that can be read ({error!r}); "
                "push it with: hstu-trt tables push"
            ) from None


def _id_rule(fields: Mapping[str, str], rows: int) -> IdRule:
    kind, default_row = fields["hash"], int(fields["default_row"]) if fields["default_row"] else None
    if kind not in ("none", "splitmix64"):
        raise ValueError(f"hash {kind!r}")
    if default_row is not None and not 0 <= default_row < rows:
        raise ValueError(f"default_row {default_row}")
    return IdRule(hash=cast(HashKind, kind), seed=int(fields["seed"]), default_row=default_row)


def value_bytes(dtype: str, dim: int) -> int:
    """Bytes of a stored row with its scale, if it has one."""
    return dim * storage_dtype(dtype).itemsize + SCALE_BYTES * (quantiser_of(dtype) is not None)


def default_partitions(rows: int, row_bytes: int) -> int:
    """The least power of two of partitions of at most 128 MiB of rows, but 64 to spread them over the nodes.

    Fewer partitions put more ids of a request into one HMGET; a partition is also what moves from node to node at once,
    and Redis moves nothing above 512 MB (``proto-max-bulk-len``).
    """
    needed = -(-rows * row_bytes // PARTITION_BYTES)
    return min(MOST_PARTITIONS, max(LEAST_PARTITIONS, 1 << max(0, needed - 1).bit_length()))


def table_key(table: str) -> str:
    """The key that names a table's versions."""
    return f"e:{{{table}}}"


def digest_field(digest: str) -> str:
    """The field of a table's hash that names the version with these rows."""
    return f"digest:{digest}"


def version_key(table: str, version: str) -> str:
    """The key of a version's description."""
    return f"e:{{{table}:{version}}}"


def rows_digest(table: StoredTable, files: Mapping[str, Mapping[str, object]]) -> str:
    """Digest of a stored table's rows, from its manifest's list of files."""
    shards: Sequence[object] = [files[shard.file]["sha256"] for shard in table.shards]
    permutation = None if table.ids.row_of_id is None else files[table.ids.row_of_id]["sha256"]
    rule = [table.ids.hash, table.ids.seed, table.ids.default_row, permutation]
    return json_digest([table.rows, table.dim, table.dtype, shards, rule])
