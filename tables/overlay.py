"""Changed rows in memory, laid over the rows of an open version: the next version, where two do not fit side by side.

A lookup asks the overlay first, by row number, after hashing and policy; so the answers are those of the whole next
version, bit by bit, further rows and scales included. The base is not touched, so taking the overlay off is the way
back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.shards import QuantisedRows, storage_dtype
from hstu_trt.contract.stored_table import StoredTable, TablesFolder
from hstu_trt.tables.delta import ChangedRows
from hstu_trt.tables.gather import NumpyGather, Outcome, RowGather
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.ids import ZERO_ROW, Policy, resolve_ids
from hstu_trt.tables.native import NativeGather
from hstu_trt.tables.table_arrays import TableArrays, write_rows


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """The rows of one table that are not the base's."""

    table: StoredTable
    """The table after the change."""
    numbers: NDArray
    """``[n]`` int64, rising: rows of the table; every row behind the base's last is among them."""
    values: NDArray
    """``[n, dim]`` in the dtype of storage."""
    scales: NDArray | None
    """``[n]`` float32 of a quantised table."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.numbers.nbytes + self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @classmethod
    def of(cls, table: StoredTable, changed: ChangedRows, under: Overlay | None = None) -> Overlay:
        """A copy of changed rows in memory, over those of an earlier overlay on the same base."""
        rows = changed.rows
        values, scales = (rows.values, rows.scale) if isinstance(rows, QuantisedRows) else (rows, None)
        numbers = changed.numbers
        if under is not None:
            kept = ~np.isin(under.numbers, numbers, assume_unique=True)
            numbers = np.concatenate([under.numbers[kept], numbers])
            order = np.argsort(numbers)
            numbers, values = numbers[order], np.concatenate([under.values[kept], values])[order]
            if scales is not None and under.scales is not None:
                scales = np.concatenate([under.scales[kept], scales])[order]
        return cls(
            table=table,
            numbers=np.array(numbers, np.int64),
            values=np.array(values, storage_dtype(table.dtype), order="C"),
            scales=None if scales is None else np.array(scales, np.float32),
        )


def overlaid_tables(
    base: HostTables, folder: TablesFolder, overlays: Mapping[str, Overlay], row_of_id: Mapping[str, NDArray]
) -> HostTables:
    """The tables of ``folder``: overlays by table over an open version, which they share the rows with."""
    gathers = {
        name: overlaid_gather(gather, overlays[name], row_of_id.get(name)) if name in overlays else gather
        for name, gather in base.gathers.items()
    }
    return base.with_gathers(folder, gathers)


def overlaid_gather(base: RowGather, overlay: Overlay, row_of_id: NDArray | None) -> RowGather:
    """Lookups in the overlay first, then in the base. ``row_of_id`` belongs to the table's permutation."""
    if isinstance(base, NativeGather):
        return base.overlaid(overlay.table, overlay.numbers, overlay.values, overlay.scales)
    return OverlayGather(base, overlay, row_of_id)


def can_fold(base: HostTables, overlays: Mapping[str, Overlay]) -> bool:
    """Whether the overlays' rows can take the place of the base's in memory: no table has grown or is a mapped file."""
    for name, overlay in overlays.items():
        gather = base.gathers[name]
        if not isinstance(gather, NativeGather | NumpyGather) or overlay.table.rows != base.tables[name].rows:
            return False
        if not all(shard.flags.writeable for shard in (*gather.arrays.values, *gather.arrays.scales)):
            return False
    return True


def fold(base: HostTables, overlays: Mapping[str, Overlay]) -> None:
    """Writes the overlays' rows over the base's. Whoever reads meanwhile must ask these overlays first."""
    for name, overlay in overlays.items():
        gather = base.gathers[name]
        assert isinstance(gather, NativeGather | NumpyGather)
        write_rows(gather.arrays, overlay.numbers, overlay.values, overlay.scales)


class OverlayGather:
    """Looks up in an overlay, and what it lacks in any base, in numpy."""

    def __init__(self, base: RowGather, overlay: Overlay, row_of_id: NDArray | None) -> None:
        self._base, self._overlay, self._row_of_id = base, overlay, row_of_id
        table = overlay.table
        scales = () if overlay.scales is None else (overlay.scales,)
        arrays = TableArrays(table, (overlay.values,), scales, np.zeros(1, np.int64), None)
        self._gather_rows = NumpyGather(arrays).gather_rows

    def lookup(self, ids: NDArray, out: NDArray, status: NDArray, policy: Policy, padding_id: int | None) -> Outcome:
        """See ``NumpyGather.lookup``."""
        table, numbers = self._overlay.table, self._overlay.numbers
        found = resolve_ids(ids, table.ids, table.rows, self._row_of_id, policy, padding_id)
        if found.rejected is not None:
            return Outcome(found.bad, found.rejected)
        place = np.searchsorted(numbers, found.rows)
        place[place == len(numbers)] = 0
        over = (numbers[place] == found.rows) & (found.rows != ZERO_ROW) if len(numbers) else np.zeros(len(ids), bool)
        rows = np.empty((int(over.sum()), table.dim), out.dtype)
        self._gather_rows(place[over], rows)
        # An id whose row is in the base means the same row there: only the table's end may have moved.
        beneath = np.flatnonzero(~over)
        base_out, base_status = np.empty((len(beneath), table.dim), out.dtype), np.empty(len(beneath), np.uint8)
        outcome = self._base.lookup(np.ascontiguousarray(ids[beneath]), base_out, base_status, policy, padding_id)
        if outcome.rejected is not None:
            return Outcome(found.bad, int(beneath[outcome.rejected]))
        out[over], out[beneath] = rows, base_out
        status[over], status[beneath] = found.status[over], base_status
        return Outcome(found.bad, None)
