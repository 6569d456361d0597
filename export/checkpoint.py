"""Reading trained weights: Meta's checkpoint directories, plain state dicts, safetensors. Nothing is unpickled.

A source yields the dense state dict, and the embedding tables as blocks of rows, so that a table larger than memory is
never held whole. Keys are those of the reference's modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.checkpoint_layout import (
    DENSE_FILE,
    DENSE_KEY,
    INDEX_FILE,
    SPARSE_FOLDER,
    checkpoint_root,
    table_of_key,
)
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.export.safe_load import load_tensors

BLOCK_BYTES = 64 << 20

_TABLE_DTYPES = {torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """One embedding table of a checkpoint."""

    name: str
    rows: int
    dim: int
    dtype: str
    blocks: Callable[[], Iterator[NDArray]]
    """Yields consecutive blocks of rows [n, dim]."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Trained weights: ``dense`` by key, ``tables`` by table name."""

    source: str
    dense: dict[str, Tensor]
    tables: dict[str, TableSource]


def pair_id(dense: Mapping[str, Tensor]) -> str:
    """Digest of a checkpoint's dense weights: a model and tables that bear the same one were trained together."""
    digest = hashlib.sha256()
    for key in sorted(dense):
        weight = dense[key].detach().contiguous()
        digest.update(f"{key} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of any known form. Raises ArtefactError that says what was expected."""
    if path.is_dir():
        return _load_dmp(_dmp_root(path))
    if not path.exists():
        raise ArtefactError(f"weights {path}: no such file or directory")
    if path.suffix == ".safetensors":
        return _from_state_dict(_load_safetensors(path), str(path))
    return _from_state_dict(_plain_state_dict(load_tensors(path, f"weights {path}")), str(path))


def _dmp_root(path: Path) -> Path:
    """The directory with ``non_sparse.ckpt``: the given one, or its only (or newest) batch directory."""
    root = checkpoint_root(path)
    if root is None:
        raise ArtefactError(
            f"weights {path}: expected {DENSE_FILE} there or in a batch directory such as {path}/0; "
            "give a checkpoint directory, a .safetensors file or a state dict saved by torch.save"
        )
    return root


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtefactError(f"weights {path}: not a valid safetensors file ({error})") from None


def _plain_state_dict(document: Any) -> Any:
    """The state dict in a torch.save file: the file itself, or under one of the usual names."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
    return document


def _from_state_dict(document: Any, source: str) -> Checkpoint:
    """Splits a state dict into dense weights and tables. The prefix of a DistributedDataParallel wrapper is cut."""
    if not isinstance(document, dict) or not all(isinstance(value, Tensor) for value in document.values()):
        raise ArtefactError(f"weights {source}: expected a dict of tensors by key")
    state = {str(key).removeprefix("module."): value.detach() for key, value in document.items()}
    names = {key: table_of_key(key) for key in state}
    dense = {key: value for key, value in state.items() if names[key] is None}
    tables = {name: _table_in_memory(name, state[key]) for key, name in names.items() if name is not None}
    return Checkpoint(source=source, dense=dense, tables=tables)


def _table_in_memory(name: str, weight: Tensor) -> TableSource:
    _check_table(name, weight.shape, weight.dtype)
    step = _block_rows(weight.shape[1], weight.dtype)

    def blocks() -> Iterator[NDArray]:
        for first in range(0, weight.shape[0], step):
            yield weight[first : first + step].numpy()

    return TableSource(
        name=name,
        rows=weight.shape[0],
        dim=weight.shape[1],
        dtype=_TABLE_DTYPES[weight.dtype],
        blocks=blocks,
    )


def _check_table(name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    if len(shape) != 2 or dtype not in _TABLE_DTYPES:
        raise ArtefactError(
            f"table {name}: it must be a [rows, dim] matrix in float16 or float32, got {list(shape)} {dtype}"
        )


def _block_rows(dim: int, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, dim * dtype.itemsize))


def _load_dmp(root: Path) -> Checkpoint:
    """Meta's DistributedModelParallel checkpoint: dense weights in one file, tables in torch.distributed.checkpoint.

    Tables that were data-parallel in training stand in the dense file; then the sparse shards are empty. Only
    ``dense_dict`` is read: optimizer state and metrics stay where they are.
    """
    document = load_tensors(root / DENSE_FILE, f"weights {root / DENSE_FILE}")
    if not isinstance(document, dict) or not isinstance(document.get(DENSE_KEY), dict):
        raise ArtefactError(f"weights {root / DENSE_FILE}: expected a dict with {DENSE_KEY!r}")
    checkpoint = _from_state_dict(document[DENSE_KEY], str(root))
    if (root / SPARSE_FOLDER / INDEX_FILE).is_file():
        checkpoint.tables.update(_sharded_tables(root / SPARSE_FOLDER))
    return checkpoint


def _sharded_tables(folder: Path) -> dict[str, TableSource]:
    from hstu_trt.export.dcp_files import read_shard_index

    index = read_shard_index(folder)
    tables = {}
    for key, entry in index.tensors.items():
        name = table_of_key(key)
        if name is not None:
            _check_table(name, torch.Size(entry.shape), entry.dtype)
            tables[name] = TableSource(
                name=name,
                rows=entry.shape[0],
                dim=entry.shape[1],
                dtype=_TABLE_DTYPES[entry.dtype],
                blocks=entry.row_blocks,
            )
    return tables
