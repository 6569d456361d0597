"""Tensors in safetensors files; ``contract.features`` finds jagged features among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Jagged

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "uint16",
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, NDArray]:
    """Every tensor of a safetensors file; bfloat16, which numpy lacks, as float32. Raises InputError."""
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which is not supported")
        array = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, NDArray]) -> None:
    """Writes a safetensors file."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)


def write_features(path: Path, uih: Mapping[str, Jagged], candidates: Mapping[str, Jagged]) -> None:
    """Writes features as ``contract.features.jagged_features`` finds them: the input file of ``hstu-trt score``."""
    tensors = {}
    for side, features in (("uih", uih), ("cand", candidates)):
        for name, feature in features.items():
            tensors[f"{side}.{name}.values"] = feature.values
            tensors[f"{side}.{name}.lengths"] = feature.lengths
    write_tensors(path, tensors)
