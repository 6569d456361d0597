"""Tensors in safetensors files, and jagged features among them."""

from __future__ import annotations

from collections.abc import Container, Mapping
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


def jagged_features(tensors: Mapping[str, NDArray], side: str, used: Container[str] | None = None) -> dict[str, Jagged]:
    """The features ``<side>.<feature>.values|lengths`` of a file; other tensors are ignored.

    used: the features to read, so that a label or another unused one may be anything; None reads all.

    Raises InputError if one of a pair is missing or the two disagree.
    """
    features = {}
    for key in tensors:
        parts = key.split(".")
        if parts[0] != side or parts[-1] not in ("values", "lengths") or len(parts) < 3:
            continue
        name = ".".join(parts[1:-1])
        if used is not None and name not in used:
            continue
        pair = [f"{side}.{name}.{part}" for part in ("values", "lengths")]
        for other in pair:
            if other not in tensors:
                raise InputError(f"tensor {other!r} is missing beside {key!r}")
        features[name] = Jagged.of(f"{side}.{name}", *(tensors[other] for other in pair))
    return features


def write_features(path: Path, uih: Mapping[str, Jagged], candidates: Mapping[str, Jagged]) -> None:
    """Writes features as ``jagged_features`` reads them: the input file of ``hstu-trt score``."""
    tensors = {}
    for side, features in (("uih", uih), ("cand", candidates)):
        for name, feature in features.items():
            tensors[f"{side}.{name}.values"] = feature.values
            tensors[f"{side}.{name}.lengths"] = feature.lengths
    write_tensors(path, tensors)
