"""libhstu_trt_tables.so through ctypes: lookups and files in huge pages, the host tier's fast form.

The library is built by ``make tables-lib``. Without it the same lookups are done in numpy, at about half the speed.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import weakref
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.stored_table import StoredTable
from hstu_trt.tables.gather import Outcome
from hstu_trt.tables.ids import POLICIES, ZERO_ROW, Policy
from hstu_trt.tables.table_arrays import TableArrays

LIBRARY = Path(__file__).resolve().parents[1] / "build/lib/libhstu_trt_tables.so"
LIBRARY_VARIABLE = "HSTU_TRT_TABLES_LIB"
"""Environment variable with the path of another library than the one in build/lib."""

ABI_VERSION = 2
_ROW_TYPES = {"float32": 0, "float16": 1, "int8": 2, "float8_e4m3fn": 3}
_HASHES = {"none": 0, "splitmix64": 1, "permutation": 2}
_MOST_THREADS = 16


class _IdRule(Structure):
    """``IdRule`` of csrc/ids.h."""

    _fields_ = (
        ("rows", c_int64), ("seed", c_uint64), ("row_of_id", c_void_p), ("id_count", c_int64),
        ("default_row", c_int64), ("padding_id", c_int64), ("hash", c_int32), ("policy", c_int32),
        ("has_padding", c_int32), ("reserved", c_int32),
    )  # fmt: skip


class _ShardRows(Structure):
    """``ShardRows`` of csrc/gather.h."""

    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("first_row", c_int64))


class _OverlayRows(Structure):
    """``OverlayRows`` of csrc/gather.h."""

    _fields_ = (
        ("numbers", c_void_p), ("slots", c_void_p), ("mask", c_uint64), ("values", c_void_p), ("scales", c_void_p),
    )  # fmt: skip


class _GatherParams(Structure):
    """``GatherParams`` of csrc/gather.h."""

    _fields_ = (
        ("shards", c_void_p), ("overlay", c_void_p), ("shard_count", c_int64), ("dim", c_int64), ("rule", _IdRule),
        ("ids", c_void_p),
        ("id_stride", c_int64), ("count", c_int64), ("out", c_void_p), ("out_stride", c_int64), ("status", c_void_p),
        ("status_stride", c_int64), ("type", c_int32), ("out_type", c_int32), ("ids_are_32_bit", c_int32),
        ("threads", c_int32), ("portable", c_int32), ("reserved", c_int32),
    )  # fmt: skip


class _GatherResult(Structure):
    _fields_ = (("bad", c_int64), ("rejected", c_int64))


class _HugePages(Structure):
    _fields_ = (("data", c_void_p), ("mapping", c_void_p), ("mapped", c_int64))


_FUNCTIONS = {
    "hstu_trt_tables_abi_version": (c_int32, []),
    "hstu_trt_tables_gather_params_size": (c_size_t, []),
    "hstu_trt_tables_gather": (c_int32, [POINTER(_GatherParams), POINTER(_GatherResult)]),
    "hstu_trt_tables_index_rows": (None, [c_void_p, c_int64, c_void_p, c_int64]),
    "hstu_trt_tables_read_file": (c_int32, [c_char_p, c_int64, c_int64, c_int32, POINTER(_HugePages)]),
    "hstu_trt_tables_release": (None, [POINTER(_HugePages)]),
    "hstu_trt_tables_splitmix64": (c_uint64, [c_int64, c_uint64]),
    "hstu_trt_tables_fastrange": (c_int64, [c_uint64, c_int64]),
}


def default_threads() -> int:
    """Threads of a lookup: one per CPU that this process may use."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


class NativeLibrary:
    """The loaded library. Raises ArtefactError if it is missing or of other sources."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtefactError(f"{path} is not there: build it with `make tables-lib`")
        try:
            self.functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise ArtefactError(f"{path} is no library of the tables room ({error}): run `make tables-lib`") from None
        version, size = self.functions.hstu_trt_tables_abi_version(), sizeof(_GatherParams)
        if version != ABI_VERSION or self.functions.hstu_trt_tables_gather_params_size() != size:
            raise ArtefactError(f"{path} is of other sources (version {version}): run `make tables-lib`")
        self.path = path

    def read_file(self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        """Reads a part of a file into memory of huge pages. Raises ArtefactError."""
        size = int(np.prod(shape)) * dtype.itemsize
        pages = _HugePages()
        error = self.functions.hstu_trt_tables_read_file(
            os.fsencode(path), offset, size, default_threads(), byref(pages)
        )
        if error:
            raise ArtefactError(f"{path}: {size} bytes from {offset} on cannot be read ({os.strerror(error)})")
        content = (ctypes.c_uint8 * max(size, 1)).from_address(pages.data)
        # The array, and every view of it, holds the buffer, with which the pages go.
        weakref.finalize(content, self.functions.hstu_trt_tables_release, pages)
        return np.frombuffer(memoryview(content), dtype, int(np.prod(shape))).reshape(shape)

    def splitmix64(self, id_: int, seed: int) -> int:
        """The hash of one id; for tests."""
        return self.functions.hstu_trt_tables_splitmix64(id_, seed)

    def fastrange(self, hashed: int, rows: int) -> int:
        """The row of one hash; for tests."""
        return self.functions.hstu_trt_tables_fastrange(hashed, rows)


class NativeGather:
    """Looks up in the arrays of one table; the same rows as ``NumpyGather``, bit by bit.

    portable: without the CPU's vector instructions.
    """

    def __init__(
        self, arrays: TableArrays, library: NativeLibrary, *, threads: int | None = None, portable: bool = False
    ) -> None:
        self._table, self.arrays, self._library = arrays.table, arrays, library
        self._threads, self._portable = threads or default_threads(), portable
        self._overlay: _OverlayRows | None = None
        self._held: tuple[NDArray | None, ...] = ()
        self._shards = (_ShardRows * max(1, len(arrays.values)))()
        for number, values in enumerate(arrays.values):
            scales = arrays.scales[number].ctypes.data if arrays.scales else None
            self._shards[number] = _ShardRows(values.ctypes.data, scales, int(arrays.first_rows[number]))
        self._rule = _rule_fields(arrays.table, arrays.row_of_id)

    def overlaid(self, table: StoredTable, numbers: NDArray, values: NDArray, scales: NDArray | None) -> NativeGather:
        """Lookups in ``table``, whose rows ``numbers`` are ``values`` and ``scales`` and whose others are here.

        numbers ``[n]`` int64, rising; values ``[n, dim]`` as stored; scales ``[n]`` float32 of a quantised table. All
        contiguous; an overlay that lies here already does not count.
        """
        other = copy.copy(self)
        slots = np.empty(1 << (2 * len(numbers)).bit_length(), np.uint32)
        self._library.functions.hstu_trt_tables_index_rows(
            numbers.ctypes.data, len(numbers), slots.ctypes.data, len(slots)
        )
        at = [None if array is None else array.ctypes.data for array in (numbers, slots, values, scales)]
        other._table, other._held = table, (numbers, slots, values, scales)
        other._overlay = _OverlayRows(at[0], at[1], len(slots) - 1, at[2], at[3])
        other._rule = _rule_fields(table, self.arrays.row_of_id)
        return other

    def lookup(self, ids: NDArray, out: NDArray, status: NDArray, policy: Policy, padding_id: int | None) -> Outcome:
        """See ``NumpyGather.lookup``."""
        table = self._table
        _check(ids, out, status, table.dim)
        rule = _IdRule(
            **self._rule,
            policy=POLICIES.index(policy),
            padding_id=0 if padding_id is None else padding_id,
            has_padding=padding_id is not None,
        )
        params = _GatherParams(
            shards=ctypes.addressof(self._shards),
            overlay=None if self._overlay is None else ctypes.addressof(self._overlay),
            shard_count=len(self.arrays.values), dim=table.dim, rule=rule,
            ids=ids.ctypes.data, id_stride=ids.strides[0], count=len(ids), out=out.ctypes.data,
            out_stride=out.strides[0], status=status.ctypes.data, status_stride=status.strides[0],
            type=_ROW_TYPES[table.dtype], out_type=_ROW_TYPES[str(out.dtype)], ids_are_32_bit=ids.dtype == np.int32,
            threads=self._threads, portable=self._portable,
        )  # fmt: skip
        result = _GatherResult()
        error = self._library.functions.hstu_trt_tables_gather(byref(params), byref(result))
        if error:
            raise MemoryError(f"lookup of {len(ids)} rows of table {table.name}: {os.strerror(error)}")
        return Outcome(result.bad, None if result.rejected < 0 else result.rejected)


def _rule_fields(table: StoredTable, row_of_id: NDArray | None) -> dict[str, int | None]:
    return {
        "rows": table.rows,
        "seed": table.ids.seed,
        "row_of_id": None if row_of_id is None else row_of_id.ctypes.data,
        "id_count": 0 if row_of_id is None else len(row_of_id),
        "default_row": ZERO_ROW if table.ids.default_row is None else table.ids.default_row,
        "hash": _HASHES[table.ids.hash],
    }


def _check(ids: NDArray, out: NDArray, status: NDArray, dim: int) -> None:
    """Raw pointers follow: the shapes and types must be what the library will take them for."""
    if out.shape != (len(ids), dim) or status.shape != (len(ids),) or ids.ndim != 1:
        raise ValueError(f"ids {ids.shape}, out {out.shape} and status {status.shape} do not fit rows of width {dim}")
    if (
        ids.dtype not in (np.int32, np.int64)
        or str(out.dtype) not in ("float32", "float16")
        or status.dtype != np.uint8
    ):
        raise ValueError(f"ids {ids.dtype}, out {out.dtype} and status {status.dtype} are not looked up")
    if out.size and out.strides[1] != out.itemsize:
        raise ValueError(f"the columns of out are {out.strides[1]} bytes apart, not {out.itemsize}")


@functools.cache
def load_library() -> NativeLibrary:
    """The library that HSTU_TRT_TABLES_LIB names, else the one in build/lib. Raises ArtefactError."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return NativeLibrary(Path(named) if named else LIBRARY)


def library_if_built() -> NativeLibrary | None:
    """The library, or None where none was built. Raises ArtefactError on one that is stale or foreign."""
    if LIBRARY_VARIABLE not in os.environ and not LIBRARY.is_file():
        return None
    return load_library()
