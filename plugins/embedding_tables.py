"""Embedding tables as the lookup kernel sees them: in GPU memory, the cold rows in pinned host memory.

A ``DeviceTable`` is one version of one table and never changes. ``LiveTables`` are the versions in use of several
tables behind one word of GPU memory: what a captured CUDA graph looks up in can be exchanged without capturing it anew.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.stored_table import HashKind
from hstu_trt.plugins.library import TABLE_TYPES, EmbeddingTable, UnsupportedError, load_library
from hstu_trt.plugins.tensors import address, type_name

_HASHES: dict[HashKind, int] = {"none": 0, "splitmix64": 1, "permutation": 2}
_ZERO_ROW = -1
_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_EMPTY_SLOT = -1
_LIVE_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Rows that stand in for those of the same number: what changed since a table was loaded."""

    slots: Tensor
    """``[slots, 2]`` int64: row and place (``OverlaySlot``); slots are a power of two."""
    values: Tensor
    """``[n, dim]``, stored as the table's rows."""
    scales: Tensor | None = None
    """``[n]`` float32 of quantised rows."""

    @classmethod
    def build(cls, row_numbers: NDArray, values: Tensor, scales: Tensor | None = None) -> Overlay:
        """row_numbers: ``[n]`` int64 >= 0, each once; values ``[n, dim]`` and scales ``[n]`` on the GPU."""
        if len(row_numbers) != len(values) or len(np.unique(row_numbers)) != len(row_numbers):
            raise InputError(f"an overlay has one row per number: {len(row_numbers)} numbers, {len(values)} rows")
        if len(row_numbers) and row_numbers.min() < 0:
            raise InputError(f"row {row_numbers.min()} of an overlay: rows count from 0")
        slots = torch.from_numpy(overlay_slots(row_numbers)).to(values.device)
        return cls(slots=slots, values=values.contiguous(), scales=scales)

    def check(self, dtype: torch.dtype) -> None:
        """Raises InputError where the kernel would read beside the slots or scales of rows that are stored so."""
        count = len(self.slots)
        if self.slots.dim() != 2 or self.slots.shape[1] != 2 or count == 0 or count & (count - 1):
            raise InputError(f"slots of an overlay are [a power of two, 2], not {list(self.slots.shape)}")
        scales = None if self.scales is None else list(self.scales.shape)
        if scales != ([len(self.values)] if dtype in _QUANTISED else None):
            raise InputError(
                f"an overlay of {len(self.values)} {dtype} rows has {scales or 'no'} scales: "
                "one for each quantised row, none for others"
            )


def overlay_slots(row_numbers: NDArray) -> NDArray:
    """Open addressing for distinct row numbers ``[n]`` int64 -> ``[slots, 2]`` int64, at most half full."""
    count = 1 << max(1, int(2 * len(row_numbers) - 1).bit_length())
    slots = np.full((count, 2), _EMPTY_SLOT, np.int64)
    wanted = (_splitmix64(row_numbers.astype(np.int64)) & np.uint64(count - 1)).astype(np.int64)
    left = np.arange(len(row_numbers))
    while len(left):
        free = slots[wanted[left], 0] == _EMPTY_SLOT
        # Of those that want one free slot, the first has it.
        _, first = np.unique(wanted[left[free]], return_index=True)
        placed = left[free][first]
        slots[wanted[placed]] = np.stack([row_numbers[placed], placed], axis=1)
        left = np.setdiff1d(left, placed, assume_unique=True)
        wanted[left] = (wanted[left] + 1) & (count - 1)
    return slots


def _splitmix64(numbers: NDArray) -> NDArray:
    """``splitmix64(number, 0)`` of the kernel."""
    z = numbers.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """One version of a table. Rows are those of ``hot``, then those of ``cold``, then those of the overlay alone."""

    hot: Tensor
    """``[hot rows, dim]`` on the GPU: float32, float16, bfloat16, int8 or float8_e4m3fn."""
    cold: Tensor | None = None
    """``[cold rows, dim]`` in pinned host memory, read over the bus by the lookup itself."""
    scales: Tensor | None = None
    """``[hot and cold rows]`` float32 on the GPU, of quantised rows."""
    rows: int | None = None
    """Rows that ids may name; None: hot and cold rows."""
    hash: HashKind = "none"
    seed: int = 0
    row_of_id: Tensor | None = None
    """``[ids]`` uint32 or int32 on the GPU, of a permutation."""
    default_row: int | None = None
    overlay: Overlay | None = None
    version: int = 0

    def __post_init__(self) -> None:
        stored = [self.hot, *([] if self.cold is None else [self.cold])]
        stored += [] if self.overlay is None else [self.overlay.values]
        if any(t.dim() != 2 or t.shape[1] != self.dim or t.dtype != self.hot.dtype for t in stored):
            shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in stored)
            raise InputError(f"hot and cold rows and those of an overlay have one type and width: {shapes}")
        if type_name(self.hot.dtype) not in TABLE_TYPES:
            raise UnsupportedError(f"embedding lookup: {self.hot.dtype} is no type of these kernels")
        if self.cold is not None and len(self.cold) and self.hot.is_cuda and not self.cold.is_pinned():
            raise InputError("cold rows must be in pinned host memory")
        quantised = self.hot.dtype in _QUANTISED
        if quantised != (self.scales is not None) or (self.scales is not None and len(self.scales) != self.stored_rows):
            raise InputError(f"{self.hot.dtype} rows have {'a' if quantised else 'no'} scale each")
        if any(not t.is_contiguous() for t in stored):
            raise InputError("rows of a table must be contiguous")
        self._check_companions()

    def _check_companions(self) -> None:
        """What the kernel reads beside rows: addresses alone reach it."""
        overlay = self.overlay
        slots, overlay_scales = (None, None) if overlay is None else (overlay.slots, overlay.scales)
        if overlay is not None:
            overlay.check(self.dtype)
        for name, tensor, dtypes in (
            ("scales", self.scales, (torch.float32,)),
            ("row_of_id", self.row_of_id, (torch.uint32, torch.int32)),
            ("slots of the overlay", slots, (torch.int64,)),
            ("scales of the overlay", overlay_scales, (torch.float32,)),
        ):
            if tensor is None:
                continue
            if tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device != self.hot.device:
                wanted = " or ".join(str(dtype) for dtype in dtypes)
                raise InputError(
                    f"{name} must be contiguous {wanted} on {self.hot.device}, as the rows are; "
                    f"got {tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
                )

    @property
    def dim(self) -> int:
        return self.hot.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.hot.dtype

    @property
    def cold_rows(self) -> int:
        return 0 if self.cold is None else len(self.cold)

    @property
    def stored_rows(self) -> int:
        """Hot and cold rows."""
        return len(self.hot) + self.cold_rows

    def params(self) -> EmbeddingTable:
        """As the kernel takes it; addresses are good as long as this object lives."""
        rows = self.stored_rows if self.rows is None else self.rows
        is_direct = self.hash == "none" and self.overlay is None
        struct = EmbeddingTable(
            hot=address(self.hot), cold=address(self.cold), scales=address(self.scales),
            row_of_id=address(self.row_of_id),
            direct_rows=min(rows, len(self.hot)) if is_direct else 0, rows=rows, hot_rows=len(self.hot),
            cold_rows=self.cold_rows, id_count=0 if self.row_of_id is None else len(self.row_of_id),
            default_row=_ZERO_ROW if self.default_row is None else self.default_row, seed=self.seed,
            version=self.version, hash=_HASHES[self.hash],
        )  # fmt: skip
        if overlay := self.overlay:
            struct.overlay, struct.overlay_scales = address(overlay.values), address(overlay.scales)
            struct.overlay_slots, struct.overlay_mask = address(overlay.slots), len(overlay.slots) - 1
        return struct


@dataclass
class LiveTables:
    """The versions in use of several tables. Types, widths and the number of tables stay."""

    tables: tuple[DeviceTable, ...]
    word: Tensor = field(init=False)
    """``[1]`` int64 on the GPU: the address of the structs."""
    _structs: Tensor = field(init=False)
    _previous: tuple[tuple[DeviceTable, ...], Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._structs = _upload(self.tables)
        self.word = torch.tensor([self._structs.data_ptr()], dtype=torch.int64, device=self._structs.device)

    def publish(self, tables: Sequence[DeviceTable]) -> None:
        """Lookups enqueued on the current stream from now on, replayed graphs too, see ``tables``.

        Lookups on other streams see the old or the new ones, whole ones with a latch. The old ones stay in memory until
        the next exchange, which waits for whatever may still read them. Raises InputError.
        """
        tables = tuple(tables)
        if [(t.dim, t.dtype) for t in tables] != [(t.dim, t.dtype) for t in self.tables]:
            raise InputError("versions of live tables have the same types and widths in the same order")
        if self._previous is not None:
            torch.cuda.synchronize(self.word.device)
        self._exchange(tables, _upload(tables))

    def roll_back(self) -> None:
        """Back to the tables before the last exchange. Raises InputError if there are none."""
        if self._previous is None:
            raise InputError("there is no version to go back to: nothing was published yet")
        self._exchange(*self._previous)

    def _exchange(self, tables: tuple[DeviceTable, ...], structs: Tensor) -> None:
        stream = torch.cuda.current_stream(self.word.device).cuda_stream
        load_library().launch_embedding_publish(self.word.data_ptr(), structs.data_ptr(), stream)
        self._previous = (self.tables, self._structs)
        self.tables, self._structs = tables, structs


def _upload(tables: Sequence[DeviceTable]) -> Tensor:
    """Structs of tables -> uint8 on the GPU."""
    if not tables:
        raise InputError("live tables are at least one")
    stored = [rows for table in tables for rows in (table.hot, table.cold) if rows is not None]
    stored += [table.overlay.values for table in tables if table.overlay is not None]
    if any(rows.data_ptr() % _LIVE_ALIGNMENT for rows in stored):
        raise InputError(f"rows of live tables begin at multiples of {_LIVE_ALIGNMENT} bytes: copy a table that is cut")
    structs = (EmbeddingTable * len(tables))(*(table.params() for table in tables))
    return torch.frombuffer(bytearray(ctypes.string_at(structs, ctypes.sizeof(structs))), dtype=torch.uint8).to(
        tables[0].hot.device
    )
