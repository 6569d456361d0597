"""Where tables come from: [rows, dim] matrices in .npy and .safetensors files, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.table_format import read_safetensors_header

# numpy has no bfloat16: its bits are read as uint16 and widened to float32, which is exact.
_BFLOAT16 = "BF16"
_STORED_AS = {"F16": "float16", "F32": "float32", "F64": "float64", _BFLOAT16: "uint16"}
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class MatrixSource:
    """A matrix in a file; ``rows()`` streams it."""

    path: Path
    matrix: NDArray
    """``[rows, dim]``, mapped into memory."""
    is_bfloat16: bool = False

    @property
    def dtype(self) -> str:
        """Name of the dtype in the file."""
        return "bfloat16" if self.is_bfloat16 else str(self.matrix.dtype)

    def blocks(self, dtype: str) -> Iterator[NDArray]:
        """Consecutive rows as ``dtype``, a few MiB at a time. Raises InputError on NaN, Inf or overflow."""
        rows, dim = self.matrix.shape
        step = max(1, _BLOCK_BYTES // (4 * dim))
        for first in range(0, rows, step):
            block = self.matrix[first : first + step]
            if self.is_bfloat16:
                block = (block.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(over="ignore"):
                converted = block.astype(dtype)
            self._check_finite(converted, block, first)
            yield converted

    def _check_finite(self, converted: NDArray, block: NDArray, first: int) -> None:
        bad = ~np.isfinite(converted)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{self.path} holds {block[row, column]} at [{first + row}, {column}], which is "
                f"{converted[row, column]} in {converted.dtype}; every score that looks it up would be worthless"
            )


def open_matrix(path: Path, tensor: str | None = None) -> MatrixSource:
    """Maps a matrix of a .npy or .safetensors file. Raises InputError, or ArtefactError when the file is damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _from_safetensors(path, tensor)
    if path.suffix != ".npy":
        raise InputError(f"{path}: tables are read from .npy and .safetensors files")
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ArtefactError(f"{path} is not a .npy file ({error})") from None
    if matrix.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: rows must be float16, float32 or float64, got {matrix.dtype}")
    return _checked(MatrixSource(path, matrix))


def _from_safetensors(path: Path, tensor: str | None) -> MatrixSource:
    header, payload = read_safetensors_header(path)
    names = sorted(name for name in header if name != "__metadata__")
    if tensor is None and len(names) != 1:
        raise ConfigError(f"{path} holds {len(names)} tensors ({', '.join(names)}): choose one with {path.name}:TENSOR")
    name = tensor if tensor is not None else names[0]
    if name not in names:
        raise ConfigError(f"{path} holds no tensor {name!r}; it holds {', '.join(names)}")
    try:
        return _checked(_map_entry(path, header[name], payload))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtefactError(f"{path}: the entry of tensor {name!r} is malformed ({error})") from None


def _map_entry(path: Path, entry: dict[str, Any], payload: int) -> MatrixSource:
    if entry["dtype"] not in _STORED_AS:
        raise InputError(f"{path}: rows must be one of {', '.join(_STORED_AS)}, got {entry['dtype']!r}")
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    stored = np.dtype(_STORED_AS[entry["dtype"]])
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError("shape and data_offsets must be integers >= 0")
    if end - start != int(np.prod(shape, dtype=object)) * stored.itemsize or payload + end > path.stat().st_size:
        raise ValueError(f"bytes {start} to {end} do not hold shape {shape} in {path.stat().st_size} bytes")
    if end == start:
        matrix = np.empty(shape, stored)
    else:
        matrix = np.memmap(path, stored, "r", offset=payload + start, shape=tuple(shape))
    return MatrixSource(path, matrix, entry["dtype"] == _BFLOAT16)


def _checked(source: MatrixSource) -> MatrixSource:
    shape = list(source.matrix.shape)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{source.path}: a table is a matrix [rows, dim] with at least one row, got shape {shape}")
    return source
