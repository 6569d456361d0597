"""Where tables come from: [rows, dim] matrices in .npy and .safetensors files, and in checkpoints.

A checkpoint is a directory of Meta's trainer or a state dict that ``torch.save`` wrote.

Rows are read a block at a time, never a whole table; a checkpoint's shards are read where they lie, without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.checkpoint_layout import (
    DENSE_FILE,
    DENSE_KEY,
    INDEX_FILE,
    SPARSE_FOLDER,
    checkpoint_root,
    table_of_key,
)
from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.shards import read_safetensors_header
from hstu_trt.tables.torch_files import TensorPlace, read_archive, read_index

# numpy has no bfloat16: its bits are read as uint16 and widened to float32, which is exact.
_BFLOAT16 = "bfloat16"
_STORED_AS = {"float16": "float16", "float32": "float32", "float64": "float64", _BFLOAT16: "uint16"}
_SAFETENSORS_NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": _BFLOAT16}
_BLOCK_BYTES = 2 << 20
_STATE_DICTS = (".pt", ".pth", ".ckpt", ".bin")
_STATE_KEYS = ("model_state_dict", "state_dict", "model")


@dataclass(frozen=True)
class FilePart:
    """Consecutive rows ``[rows, dim]`` in a file, row after row unless ``by_columns``."""

    path: Path
    offset: int
    rows: int
    dim: int
    stored: str
    """numpy's dtype of the bytes."""
    by_columns: bool = False

    def read(self, first: int, count: int) -> NDArray:
        """Rows ``[count, dim]``: read, not mapped, so that they do not count as this process's memory for long."""
        if self.by_columns:
            return np.asarray(self.mapped()[first : first + count])
        with self.path.open("rb") as stream:
            stream.seek(self.offset + first * self.dim * np.dtype(self.stored).itemsize)
            return np.fromfile(stream, self.stored, count * self.dim).reshape(count, self.dim)

    def mapped(self) -> NDArray:
        """All rows, mapped into memory."""
        order = "F" if self.by_columns else "C"
        return np.memmap(self.path, self.stored, "r", self.offset, (self.rows, self.dim), order)  # type: ignore[call-overload]


@dataclass(frozen=True)
class MatrixSource:
    """A matrix in one or several files; ``blocks()`` streams it."""

    path: Path
    parts: tuple[FilePart, ...]
    dtype: str
    """In the files: float16, float32, float64 or bfloat16."""

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.parts[0].dim

    def blocks(self, dtype: str, order: NDArray | None = None) -> Iterator[NDArray]:
        """Rows as ``dtype``, a few MiB at a time: consecutive ones, or those that ``order`` [rows] names.

        Raises InputError on NaN, Inf or overflow.
        """
        step = max(1, _BLOCK_BYTES // (4 * self.dim))
        if order is not None:
            for first in range(0, self.rows, step):
                yield self._converted(self._take(order[first : first + step]), order[first : first + step], dtype)
            return
        begin = 0
        for part in self.parts:
            for first in range(0, part.rows, step):
                block = part.read(first, min(step, part.rows - first))
                yield self._converted(block, begin + first + np.arange(len(block)), dtype)
            begin += part.rows

    def _take(self, rows: NDArray) -> NDArray:
        ends = np.cumsum([part.rows for part in self.parts])
        number = np.searchsorted(ends, rows, side="right")
        block = np.empty((len(rows), self.dim), self.parts[0].stored)
        for part in np.unique(number):
            here = np.flatnonzero(number == part)
            block[here] = self.parts[part].mapped()[rows[here] - (ends[part] - self.parts[part].rows)]
        return block

    def _converted(self, block: NDArray, rows: NDArray, dtype: str) -> NDArray:
        if self.dtype == _BFLOAT16:
            block = (block.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            converted = block.astype(dtype, copy=False)
        bad = ~np.isfinite(converted)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{self.path} holds {block[row, column]} at [{rows[row]}, {column}], which is "
                f"{converted[row, column]} in {converted.dtype}; every score that looks it up would be worthless"
            )
        return converted


def is_checkpoint(path: Path) -> bool:
    """Whether tables there have names: a directory, or a file with the ending of a state dict."""
    return path.is_dir() or path.suffix in _STATE_DICTS


def open_matrix(path: Path, tensor: str | None = None) -> MatrixSource:
    """Opens a matrix of a .npy or .safetensors file, or a table of a checkpoint.

    Raises InputError, or ArtefactError when a file is damaged.
    """
    if path.is_dir():
        return _from_checkpoint(path, tensor)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _from_safetensors(path, tensor)
    if path.suffix in _STATE_DICTS:
        return _chosen(path, _state_dict_tables(path), tensor)
    if path.suffix != ".npy":
        raise InputError(
            f"{path}: tables are read from .npy and .safetensors files, from checkpoint directories and from state "
            f"dicts of torch.save ({', '.join(_STATE_DICTS)})"
        )
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        offset = int(matrix.offset)
    except Exception as error:  # numpy's parser of headers raises whatever a wrong byte leads it to
        raise ArtefactError(f"{path} is not a .npy file ({error})") from None
    if str(matrix.dtype) not in _STORED_AS:
        raise InputError(f"{path}: rows must be float16, float32 or float64, got {matrix.dtype}")
    place = TensorPlace(path=path, offset=offset, shape=matrix.shape, dtype=str(matrix.dtype))
    return _source(path, [place], by_columns=not matrix.flags.c_contiguous)


def _from_safetensors(path: Path, tensor: str | None) -> MatrixSource:
    header, payload = read_safetensors_header(path)
    names = sorted(name for name in header if name != "__metadata__")
    if tensor is None and len(names) != 1:
        raise ConfigError(f"{path} holds {len(names)} tensors ({', '.join(names)}): choose one with {path.name}:TENSOR")
    name = tensor if tensor is not None else names[0]
    if name not in names:
        raise ConfigError(f"{path} holds no tensor {name!r}; it holds {', '.join(names)}")
    try:
        return _source(path, [_entry_place(path, header[name], payload)])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtefactError(f"{path}: the entry of tensor {name!r} is malformed ({error})") from None


def _entry_place(path: Path, entry: dict[str, Any], payload: int) -> TensorPlace:
    if entry["dtype"] not in _SAFETENSORS_NAMES:
        raise InputError(f"{path}: rows must be one of {', '.join(_SAFETENSORS_NAMES)}, got {entry['dtype']!r}")
    dtype, shape, (start, end) = _SAFETENSORS_NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError("shape and data_offsets must be integers >= 0")
    size = int(np.prod(shape, dtype=object)) * np.dtype(_STORED_AS[dtype]).itemsize
    if end - start != size or payload + end > path.stat().st_size:
        raise ValueError(f"bytes {start} to {end} do not hold shape {shape} in {path.stat().st_size} bytes")
    return TensorPlace(path=path, offset=payload + start, shape=tuple(shape), dtype=dtype)


def _from_checkpoint(path: Path, table: str | None) -> MatrixSource:
    root = checkpoint_root(path)
    if root is None:
        raise InputError(f"{path}: no checkpoint directory, {DENSE_FILE} is not there nor in a batch directory")
    return _chosen(root, _checkpoint_tables(root), table)


def _chosen(path: Path, tables: dict[str, list[TensorPlace]], table: str | None) -> MatrixSource:
    if table is None and len(tables) == 1:
        table = next(iter(tables))
    if table not in tables:
        raise ConfigError(f"{path} has no table {table!r}; it has {', '.join(sorted(tables)) or 'none'}")
    return _source(path, tables[table])


def _state_dict_tables(path: Path) -> dict[str, list[TensorPlace]]:
    """Table -> its rows: the tensors whose keys name a table, of the file or of a usual entry of it."""
    document = read_archive(path)
    for key in _STATE_KEYS:
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    if not isinstance(document, dict):
        raise ArtefactError(f"{path}: expected a state dict, tensors by key")
    return _tables_by_name({key: [value] for key, value in document.items() if isinstance(value, TensorPlace)})


def _tables_by_name(places: dict[str, list[TensorPlace]]) -> dict[str, list[TensorPlace]]:
    named = {table_of_key(str(key)): value for key, value in places.items()}
    return {name: value for name, value in named.items() if name is not None}


def _checkpoint_tables(root: Path) -> dict[str, list[TensorPlace]]:
    """Table -> its chunks. Tables that were data-parallel in training stand among the dense weights."""
    index = root / SPARSE_FOLDER / INDEX_FILE
    sharded = read_index(root / SPARSE_FOLDER) if index.is_file() else {}
    document = read_archive(root / DENSE_FILE)
    dense = document.get(DENSE_KEY) if isinstance(document, dict) else None
    if not isinstance(dense, dict):
        raise ArtefactError(f"{root / DENSE_FILE}: expected a dict with {DENSE_KEY!r}")
    whole = {key: [value] for key, value in dense.items() if isinstance(value, TensorPlace)}
    return _tables_by_name(whole | sharded)


def _source(path: Path, places: list[TensorPlace], *, by_columns: bool = False) -> MatrixSource:
    places = [place for place in places if place.shape[:1] != (0,)] or places
    shape, dtype = list(places[0].shape), places[0].dtype
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: a table is a matrix [rows, dim] with at least one row, got shape {shape}")
    if dtype not in _STORED_AS or any(place.dtype != dtype or place.shape[1:] != (shape[1],) for place in places):
        raise InputError(f"{path}: rows must be one of {', '.join(_STORED_AS)} and of one width, got {dtype} {shape}")
    parts = [FilePart(p.path, p.offset, p.shape[0], p.shape[1], _STORED_AS[dtype], by_columns) for p in places]
    return MatrixSource(path, tuple(parts), dtype)
