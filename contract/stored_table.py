"""What a manifest says about embedding tables: rows, shards, and how an id becomes a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.shards import SCALE_TENSOR, quantiser_of, shard_layout, storage_dtype

HashKind = Literal["none", "splitmix64", "permutation"]
RowOrder = Literal["identity", "rank"]


@dataclass(frozen=True, kw_only=True)
class IdRule:
    """How an id becomes a row, and which row answers for a bad id."""

    hash: HashKind = "none"
    """``none``: the id is the row. ``splitmix64``: row = high half of splitmix64(id ^ seed) * rows, whatever the id.
    ``permutation``: row = row_of_id[id]."""
    seed: int = 0
    row_of_id: str | None = None
    """File of the permutation, relative to the tables folder."""
    default_row: int | None = None
    """The row that the policy ``default_row`` answers; None: a zero row."""

    def __post_init__(self) -> None:
        if self.hash not in get_args(HashKind):
            raise ConfigError(f"unknown hash {self.hash!r}: choose from {', '.join(get_args(HashKind))}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 64 or (self.seed and self.hash != "splitmix64"):
            raise ConfigError(f"seed {self.seed!r}: splitmix64 takes a whole number of 64 bits, other hashes take none")
        if (self.row_of_id is not None) != (self.hash == "permutation"):
            raise ConfigError(
                f"hash {self.hash!r} with row_of_id {self.row_of_id!r}: a permutation needs one, others none"
            )


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
    """``float32``, ``float16``, ``int8`` or ``float8_e4m3fn``; the latter two with a scale per row."""
    features: tuple[str, ...]
    shards: tuple[Shard, ...]
    ids: IdRule = IdRule()
    row_order: RowOrder = "identity"
    """``rank``: rows fall in popularity, so the hottest are the first."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, without its scale."""
        return self.dim * storage_dtype(self.dtype).itemsize

    @property
    def is_quantised(self) -> bool:
        """Whether each row has a scale."""
        return quantiser_of(self.dtype) is not None

    @property
    def payload_bytes(self) -> int:
        """Bytes of all rows and scales."""
        return self.rows * (self.row_bytes + 4 * self.is_quantised)

    def scale_offset(self, shard: Shard) -> int:
        """Byte offset of the scale of a shard's first row, in a table that is quantised."""
        layout = shard_layout(self.dtype, self.dim, shard.rows)
        return shard.payload_offset + int(layout[SCALE_TENSOR]["data_offsets"][0])


@dataclass(frozen=True)
class TablesFolder:
    """A tables folder as its manifest describes it."""

    path: Path
    tables: dict[str, StoredTable]
    files: Mapping[str, Mapping[str, Any]]
    """File -> ``bytes`` and ``sha256``."""
    version: str | None
    """The name of the version, where there are several."""
    pair_id: str | None
    """Digest of the dense weights that the tables were trained with; None: unknown."""


def is_table_name(name: str) -> bool:
    """Whether a table may bear this name: it is also the name of a folder."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None
