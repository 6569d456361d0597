"""Lookups in numpy: what the C++ library is held against, and what stands in for it where it was not built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.shards import QuantisedRows
from hstu_trt.tables.ids import ZERO_ROW, Policy, resolve_ids
from hstu_trt.tables.quantisers import dequantise_rows
from hstu_trt.tables.table_arrays import TableArrays


@dataclass(frozen=True)
class Outcome:
    """What a lookup found besides rows."""

    bad: int
    """Ids outside the table."""
    rejected: int | None
    """Place of the first id that the policy rejects; then rows and status mean nothing."""


class RowGather(Protocol):
    """Looks up in one table: ``NativeGather``, ``NumpyGather``, or an overlay over either."""

    def lookup(
        self, ids: NDArray, out: NDArray, status: NDArray, policy: Policy, padding_id: int | None
    ) -> Outcome: ...


class NumpyGather:
    """Looks up in the arrays of one table."""

    def __init__(self, arrays: TableArrays) -> None:
        self.arrays = arrays

    def lookup(self, ids: NDArray, out: NDArray, status: NDArray, policy: Policy, padding_id: int | None) -> Outcome:
        """Fills ``out`` [n, dim] float32 or float16, and ``status`` [n] uint8, for ids ``[n]`` int32 or int64."""
        table = self.arrays.table
        found = resolve_ids(ids, table.ids, table.rows, self.arrays.row_of_id, policy, padding_id)
        if found.rejected is not None:
            return Outcome(found.bad, found.rejected)
        status[...] = found.status
        zero = found.rows == ZERO_ROW
        if not zero.any():
            self.gather_rows(found.rows, out)
        else:
            rows = np.empty((len(ids) - int(zero.sum()), table.dim), out.dtype)
            self.gather_rows(found.rows[~zero], rows)
            out[~zero], out[zero] = rows, 0
        return Outcome(found.bad, None)

    def gather_rows(self, rows: NDArray, out: NDArray) -> None:
        """Fills ``out`` [n, dim] with rows ``[n]`` int64, all of the table."""
        if len(self.arrays.values) == 1:
            self._take(0, rows, out)
            return
        number = np.searchsorted(self.arrays.first_rows, rows, side="right") - 1
        for shard in np.unique(number):
            here = np.flatnonzero(number == shard)
            part = np.empty((len(here), self.arrays.table.dim), out.dtype)
            self._take(shard, rows[here] - self.arrays.first_rows[shard], part)
            out[here] = part

    def _take(self, shard: int, rows: NDArray, out: NDArray) -> None:
        values = self.arrays.values[shard].take(rows, axis=0)
        with np.errstate(over="ignore"):
            if self.arrays.scales:
                scaled = QuantisedRows(values, self.arrays.scales[shard].take(rows))
                out[...] = dequantise_rows(scaled, self.arrays.table.dtype)
            else:
                out[...] = values
