"""Rows <-> the values that a cluster holds: the stored row, and its float32 scale behind it if it is quantised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.shards import storage_dtype
from hstu_trt.contract.stored_table import StoredTable
from hstu_trt.tables.gather import NumpyGather
from hstu_trt.tables.native import NativeGather, library_if_built
from hstu_trt.tables.remote_layout import SCALE_BYTES, RemoteVersion
from hstu_trt.tables.table_arrays import TableArrays


def encode_values(rows: NDArray, scale: NDArray | None) -> NDArray:
    """Stored rows ``[n, dim]`` and their scales ``[n]`` float32, if any -> values uint8 ``[n, value_bytes]``."""
    codes = np.ascontiguousarray(rows).view(np.uint8)
    if scale is None:
        return codes
    return np.concatenate([codes, np.ascontiguousarray(scale, np.float32)[:, None].view(np.uint8)], axis=1)


def decode_values(version: RemoteVersion, values: NDArray, out: NDArray) -> None:
    """Values uint8 ``[n, value_bytes]`` -> rows ``[n, dim]`` of ``out``'s dtype.

    The host tier converts them, as a table of these rows, so that both tiers give the same bits.
    """
    count = len(values)
    if not count:
        return
    codes = values[:, : version.value_bytes - SCALE_BYTES] if version.is_quantised else values
    scales: tuple[NDArray, ...] = ()
    if version.is_quantised:
        scales = (np.ascontiguousarray(values[:, -SCALE_BYTES:]).view(np.float32)[:, 0],)
    table = StoredTable(version.table, count, version.dim, version.dtype, (), ())
    rows = np.ascontiguousarray(codes).view(storage_dtype(version.dtype))
    arrays = TableArrays(table, (rows,), scales, np.zeros(1, np.int64), None)
    library = library_if_built()
    gather = NumpyGather(arrays) if library is None else NativeGather(arrays, library)
    gather.lookup(np.arange(count), out, np.empty(count, np.uint8), "zero", None)
