"""The host tier: embedding tables on a CPU.

Tables are mapped into memory, so that nothing is read before a lookup touches it and a table may be larger than the
memory; ``resident`` reads them into memory of huge pages instead, which is twice as fast. Rows come back exactly as
stored, quantised ones as ``quantisers.py`` says; another output dtype rounds as numpy does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.stored_table import StoredTable, TablesFolder
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.tables.gather import NumpyGather, RowGather
from hstu_trt.tables.ids import POLICIES, Policy, range_text
from hstu_trt.tables.native import NativeGather, library_if_built, load_library
from hstu_trt.tables.table_arrays import map_file, open_arrays, read_file

OutputDtype = Literal["float32", "float16"]
_ID_DTYPES = frozenset((np.dtype(np.int32), np.dtype(np.int64)))
REGENERATE = "hstu-trt export, or hstu-trt tables convert --table NAME=FILE --out {folder}"


@dataclass(frozen=True, kw_only=True)
class LookupOptions:
    """How a lookup answers."""

    policy: Policy = "reject"
    """What an id outside its table does: ``reject`` raises InputError; ``zero`` answers a zero row, ``clamp`` the
    nearest row, ``row0`` the first one, ``default_row`` the table's default row (a zero row where it has none)."""
    padding_id: int | None = None
    """This id answers a zero row under every policy."""
    dtype: OutputDtype = "float32"
    what: str = "ids"
    """Name of the ids' tensor, for messages."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown id policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"lookups answer float32 or float16, not {self.dtype!r}")


class HostTables:
    """The tables of a folder, open for lookups. Threads may share it."""

    def __init__(self, folder: TablesFolder, gathers: Mapping[str, RowGather]) -> None:
        """Use ``HostTables.open``."""
        self.folder = folder
        self.tables = folder.tables
        self.bad_ids: Counter[str] = Counter()
        """Ids outside each table so far."""
        self.gathers: Mapping[str, RowGather] = gathers
        self._lock = threading.Lock()
        self._table_of = {feature: table.name for table in self.tables.values() for feature in table.features}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        verify: bool = False,
        resident: bool = False,
        native: bool | None = None,
        threads: int | None = None,
    ) -> HostTables:
        """Opens the tables of a folder, or of the version in use of a folder of versions.

        verify: also re-hashes every shard. resident: reads all rows now. native: whether lookups run in the C++
        library; None: if it was built. threads: of one lookup there; None: one per CPU. Raises ArtefactError.
        """
        folder = current_tables(folder)
        found = read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder), verify=verify)
        library = None if native is False else load_library() if native else library_if_built()
        read = map_file if not resident else read_file if library is None else library.read_file
        arrays = {name: open_arrays(folder, table, read) for name, table in found.tables.items()}
        if library is None:
            return cls(found, {name: NumpyGather(array) for name, array in arrays.items()})
        return cls(found, {name: NativeGather(array, library, threads=threads) for name, array in arrays.items()})

    def with_gathers(self, folder: TablesFolder, gathers: Mapping[str, RowGather]) -> HostTables:
        """Tables of another folder, by gathers of which some are of these tables."""
        return HostTables(folder, gathers)

    def close(self) -> None:
        """Lets go of the rows; their memory goes with the last lookup, or overlay, that holds them."""
        self.gathers = {}

    def lookup(
        self,
        table: str,
        ids: NDArray,
        *,
        policy: Policy = "reject",
        padding_id: int | None = None,
        dtype: OutputDtype = "float32",
        what: str = "ids",
    ) -> NDArray:
        """Rows of one table: ids ``[n]`` int32 or int64 -> ``[n, dim]``; see ``LookupOptions``."""
        options = LookupOptions(policy=policy, padding_id=padding_id, dtype=dtype, what=what)
        return self.lookup_with_status(table, ids, options)[0]

    def lookup_with_status(self, table: str, ids: NDArray, options: LookupOptions) -> tuple[NDArray, NDArray]:
        """Rows of one table and where they came from: ids ``[n]`` -> ``[n, dim]``, ``[n]`` uint8 (RowStatus)."""
        if table not in self.tables:
            raise ConfigError(f"no table {table!r}; tables: {', '.join(self.tables) or 'none'}")
        check_ids(ids, 1, options.what)
        stored = self.tables[table]
        out, status = np.empty((len(ids), stored.dim), options.dtype), np.empty(len(ids), np.uint8)
        bad = self._fill(stored, ids, out, status, options)
        if bad is not None:
            raise InputError(
                f"tensor {options.what!r} holds {ids[bad]} at [{bad}]; {range_text(stored.name, stored.rows)}"
            )
        return out, status

    def lookup_features(
        self,
        features: Sequence[str],
        ids: NDArray,
        *,
        policy: Policy = "reject",
        padding_id: int | None = None,
        dtype: OutputDtype = "float32",
        what: str = "ids",
    ) -> NDArray:
        """Rows of several features side by side: ids ``[n, features]`` -> ``[n, sum of the tables' dims]``.

        Under the policy ``reject``, raises InputError naming ``what``, feature, position and value.
        """
        options = LookupOptions(policy=policy, padding_id=padding_id, dtype=dtype, what=what)
        return self.lookup_features_with_status(features, ids, options)[0]

    def lookup_features_with_status(
        self, features: Sequence[str], ids: NDArray, options: LookupOptions
    ) -> tuple[NDArray, NDArray]:
        """As ``lookup_features``, and the status ``[n, features]`` uint8 (RowStatus)."""
        tables = [self._stored(feature) for feature in features]
        check_columns(features, ids, options.what)
        ends = np.cumsum([0, *(table.dim for table in tables)])
        out, status = np.empty((len(ids), ends[-1]), options.dtype), np.empty(ids.shape, np.uint8)
        for column, (feature, table) in enumerate(zip(features, tables, strict=True)):
            rows = out[:, ends[column] : ends[column + 1]]
            self._fill_column(feature, table, ids, column, rows, status[:, column], options)
        return out, status

    def _fill_column(
        self, feature: str, table: StoredTable, ids: NDArray, column: int, out: NDArray, status: NDArray,
        options: LookupOptions,
    ) -> None:  # fmt: skip
        """Fills ``out`` and ``status`` for a column of ids. Raises InputError for an id that the policy rejects."""
        bad = self._fill(table, ids[:, column], out, status, options)
        if bad is not None:
            raise InputError(
                f"tensor {options.what!r} (feature {feature!r}) holds {ids[bad, column]} at [{bad}, {column}]; "
                f"{range_text(table.name, table.rows)}"
            )

    def _stored(self, feature: str) -> StoredTable:
        if feature not in self._table_of:
            raise ConfigError(f"no table for feature {feature!r}; features: {', '.join(sorted(self._table_of))}")
        return self.tables[self._table_of[feature]]

    def _fill(
        self, table: StoredTable, ids: NDArray, out: NDArray, status: NDArray, options: LookupOptions
    ) -> int | None:
        """Fills ``out`` and ``status`` for ids ``[n]``; returns the place of the first id to reject, if any."""
        outcome = self.gathers[table.name].lookup(ids, out, status, options.policy, options.padding_id)
        if outcome.bad:
            with self._lock:
                self.bad_ids[table.name] += outcome.bad
        return outcome.rejected


def check_ids(ids: NDArray, ndim: int, what: str) -> None:
    """Raises InputError unless ids are integers of that many dimensions."""
    if ids.dtype not in _ID_DTYPES:
        raise InputError(f"tensor {what!r} must be int64 or int32, got {ids.dtype}")
    if ids.ndim != ndim:
        raise InputError(f"tensor {what!r} must have {ndim} dimensions, got shape {list(ids.shape)}")


def check_columns(features: Sequence[str], ids: NDArray, what: str) -> None:
    """Raises InputError unless ids are integers ``[n, features]``."""
    check_ids(ids, 2, what)
    if ids.shape[1] != len(features):
        raise InputError(
            f"tensor {what!r} must have {len(features)} columns ({', '.join(features)}), got {list(ids.shape)}"
        )
