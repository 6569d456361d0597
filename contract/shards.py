"""Shards: consecutive rows of an embedding table in one safetensors file.

    rows    [n, dim]  F32, F16, I8 or F8_E4M3   begins at byte 4096
    scale   [n]       F32                       of I8 and F8_E4M3 rows: real value = stored value * scale

Every tensor begins at a multiple of 4096 bytes, so that it can be mapped into memory, read past the page cache, or
named by an ONNX file as external data. The gaps are tensors of their own (``pad.scale`` stands before ``scale``), since
safetensors allows no holes. Scales stand apart from the rows: a row of 512 quantised values is 512 aligned bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError

SHARD_TENSOR = "rows"
SCALE_TENSOR = "scale"
PAYLOAD_ALIGNMENT = 4096
_MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class _Storage:
    safetensors: str
    numpy: str
    """numpy's dtype of the stored bytes: it has no float8."""
    quantiser: str | None = None


_STORAGE: dict[str, _Storage] = {
    "float32": _Storage("F32", "float32"),
    "float16": _Storage("F16", "float16"),
    "int8": _Storage("I8", "int8", "int8_sym_row"),
    "float8_e4m3fn": _Storage("F8_E4M3", "uint8", "e4m3_row"),
}
STORED_DTYPES = tuple(_STORAGE)
_STORED_NAMES = {storage.safetensors: name for name, storage in _STORAGE.items()}
_ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "F8_E4M3": 1, "I64": 8, "U32": 4, "U8": 1}
_NUMPY_TO_SAFETENSORS = {"float32": "F32", "int64": "I64", "uint32": "U32"}


def storage_dtype(dtype: str) -> np.dtype:
    """numpy's dtype of stored rows: ``uint8`` for ``float8_e4m3fn``."""
    return np.dtype(_STORAGE[dtype].numpy)


def quantiser_of(dtype: str) -> str | None:
    """How rows of this dtype were quantised: ``int8_sym_row``, ``e4m3_row``, or None."""
    return _STORAGE[dtype].quantiser


@dataclass(frozen=True)
class QuantisedRows:
    """Rows with a scale each: real value = stored value * scale."""

    values: NDArray
    """``[n, dim]`` int8, or uint8 that holds the bits of e4m3."""
    scale: NDArray
    """``[n]`` float32, finite and >= 0."""

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> QuantisedRows:
        return QuantisedRows(self.values[rows], self.scale[rows])


Block = NDArray | QuantisedRows
"""Consecutive rows ``[n, dim]`` as they are stored."""


def shard_layout(
    dtype: str, dim: int, rows: int, columns: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The safetensors entries of a shard by tensor, offsets relative to the payload.

    columns: safetensors dtype of further tensors ``[rows]`` by name.
    """
    tensors: list[tuple[str, str, list[int]]] = [(SHARD_TENSOR, _STORAGE[dtype].safetensors, [rows, dim])]
    if quantiser_of(dtype):
        tensors.append((SCALE_TENSOR, "F32", [rows]))
    tensors += [(name, column, [rows]) for name, column in (columns or {}).items()]
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, stored, shape in tensors:
        if gap := -end % PAYLOAD_ALIGNMENT:
            entries[f"pad.{name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        size = rows * (shape[1] if len(shape) == 2 else 1) * _ITEM_BYTES[stored]
        entries[name] = {"dtype": stored, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return entries


class ShardWriter:
    """Writes a shard block by block; leaving it completes the file. Holds one block, and 4 bytes per quantised row."""

    def __init__(self, path: Path, dtype: str, dim: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, 0
        self._dtype, self._dim = dtype, dim
        self._scales: list[NDArray] = []
        self._columns: dict[str, NDArray] = {}
        self._stream = path.open("wb")
        self._stream.write(_header({}))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if error is None:
                self._complete()

    def add(self, block: Block) -> None:
        """Appends rows. Raises ArtefactError where their width or form is not the shard's."""
        values = block.values if isinstance(block, QuantisedRows) else block
        if values.ndim != 2 or values.shape[1] != self._dim:
            raise ArtefactError(
                f"{self.path}: a block of rows has shape {list(values.shape)}, the table's width is {self._dim}"
            )
        if isinstance(block, QuantisedRows) != (quantiser_of(self._dtype) is not None):
            raise ArtefactError(
                f"{self.path}: {self._dtype} rows have {'a' if quantiser_of(self._dtype) else 'no'} scale"
            )
        if isinstance(block, QuantisedRows):
            self._scales.append(np.ascontiguousarray(block.scale, dtype=np.float32))
        self._stream.write(np.ascontiguousarray(values, dtype=storage_dtype(self._dtype)).data)
        self.rows += len(values)

    def add_column(self, name: str, values: NDArray) -> None:
        """A further tensor ``[rows]``, int64 or uint32, behind the others."""
        self._columns[name] = values

    def _complete(self) -> None:
        columns = {name: _NUMPY_TO_SAFETENSORS[str(values.dtype)] for name, values in self._columns.items()}
        layout = shard_layout(self._dtype, self._dim, self.rows, columns)
        parts = {SCALE_TENSOR: self._scales} | {name: [values] for name, values in self._columns.items()}
        for name, arrays in parts.items():
            if name in layout:
                self._stream.seek(PAYLOAD_ALIGNMENT + layout[name]["data_offsets"][0])
                for array in arrays:
                    self._stream.write(np.ascontiguousarray(array).data)
        self._stream.truncate(PAYLOAD_ALIGNMENT + max(entry["data_offsets"][1] for entry in layout.values()))
        self._stream.seek(0)
        self._stream.write(_header(layout))


def _header(layout: Mapping[str, Any]) -> bytes:
    text = json.dumps(layout).encode()
    return struct.pack("<Q", PAYLOAD_ALIGNMENT - 8) + text.ljust(PAYLOAD_ALIGNMENT - 8)


def write_shard(path: Path, dtype: str, dim: int, blocks: Iterable[Block]) -> int:
    """Writes blocks of rows ``[n, dim]`` as one shard and returns its row count."""
    with ShardWriter(path, dtype, dim) as shard:
        for block in blocks:
            shard.add(block)
    return shard.rows


def write_vector(path: Path, name: str, values: NDArray) -> None:
    """Writes one tensor ``[n]``, int64 or uint32, as a file whose payload begins at byte 4096."""
    stored = _NUMPY_TO_SAFETENSORS[str(values.dtype)]
    entry = {"dtype": stored, "shape": [len(values)], "data_offsets": [0, values.nbytes]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(_header({name: entry}))
        stream.write(np.ascontiguousarray(values).data)


def map_vector(path: Path, name: str, dtype: str) -> NDArray:
    """Maps what ``write_vector`` wrote. Raises ArtefactError on anything else."""
    document, payload = read_safetensors_header(path)
    size = path.stat().st_size - payload
    count = size // np.dtype(dtype).itemsize
    entry = {"dtype": _NUMPY_TO_SAFETENSORS[dtype], "shape": [count], "data_offsets": [0, size]}
    if document != {name: entry} or size % np.dtype(dtype).itemsize or payload % PAYLOAD_ALIGNMENT:
        raise ArtefactError(f"{path}: expected one tensor {name!r} [{count}] {dtype} at byte {PAYLOAD_ALIGNMENT}")
    if not count:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset=payload, shape=(count,)))


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


def read_shard_header(path: Path, columns: Mapping[str, str] | None = None) -> tuple[str, int, int, int]:
    """Returns (dtype, rows, dim, payload offset) of a shard. Raises ArtefactError on anything unexpected."""
    document, payload = read_safetensors_header(path)
    try:
        entry = document[SHARD_TENSOR]
        dtype, (rows, dim) = _STORED_NAMES[entry["dtype"]], entry["shape"]
        whole_number("rows", rows, 0)
        whole_number("dim", dim, 1)
        layout = shard_layout(dtype, dim, rows, columns)
        if strange := set(document) - set(layout) - {"__metadata__"}:
            raise ValueError(f"unexpected tensor {min(strange)!r}")
        offsets = {name: document[name]["data_offsets"] for name in layout}
        same_types = all(document[name]["dtype"] == entry["dtype"] for name, entry in layout.items())
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is not a table shard ({type(error).__name__}: {error})") from None
    size, end = path.stat().st_size, payload + max(entry["data_offsets"][1] for entry in layout.values())
    if not same_types or size != end or offsets != {name: entry["data_offsets"] for name, entry in layout.items()}:
        raise ArtefactError(f"{path} is damaged: {size} bytes, {end} expected for [{rows}, {dim}] {dtype}")
    if payload % PAYLOAD_ALIGNMENT:
        raise ArtefactError(f"{path}: its rows begin at byte {payload}, not at a multiple of {PAYLOAD_ALIGNMENT}")
    return dtype, rows, dim, payload


def whole_number(what: str, value: Any, least: int) -> int:
    """``value`` if it is a JSON integer of at least ``least``; raises ValueError."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} must be an integer >= {least}, got {value!r}")
    return value
