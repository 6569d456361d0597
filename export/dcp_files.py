"""torch.distributed.checkpoint folders, read without trusting their pickle.

``.metadata`` is a pickle of a few dataclasses. PyTorch's own reader unpickles it as it is; here an unpickler that knows
just those classes reads it, so that a hostile file is refused instead of run. The shards themselves are tensors that
``torch.load(weights_only=True)`` reads.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hstu_trt.contract.checkpoint_layout import INDEX_FILE, FilePart
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.export.safe_load import load_tensors

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float16", "float32", "bfloat16", "float64", "int8", "uint8", "int32", "int64", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}  # fmt: skip


def _enum_member(owner: Any, name: str) -> Any:
    """Stands in for ``getattr``, by which early releases of Python 3.11 pickle enum members."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)) or name not in owner.__members__:
        raise pickle.UnpicklingError(f"it looks up {name!r} on {owner!r}, which no checkpoint index needs")
    return owner[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint index needs")
        return super().find_class(module, name)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Consecutive rows of a tensor: where they begin, how many they are, and where their bytes lie."""

    first_row: int
    rows: int
    file: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class ShardedTensor:
    """A tensor in row-wise shards; chunks are sorted and without gaps."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]

    def row_blocks(self) -> Iterator[NDArray]:
        """Yields the rows in order, a chunk at a time. Raises ArtefactError on a damaged chunk."""
        for chunk in self.chunks:
            tensor = _read_chunk(chunk, self.key)
            if tuple(tensor.shape) != (chunk.rows, *self.shape[1:]) or tensor.dtype != self.dtype:
                raise ArtefactError(
                    f"{chunk.file}: {self.key} has {list(tensor.shape)} {tensor.dtype} from row {chunk.first_row}, "
                    f"its index says {[chunk.rows, *self.shape[1:]]} {self.dtype}"
                )
            yield tensor.detach().numpy()


@dataclass(frozen=True)
class ShardIndex:
    """The tensors of a checkpoint folder by key."""

    tensors: dict[str, ShardedTensor]


def read_shard_index(folder: Path) -> ShardIndex:
    """Reads ``.metadata``. Raises ArtefactError when it is damaged, hostile or sharded by columns."""
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        entries = metadata.state_dict_metadata.items()
        tensors = {
            key: _sharded_tensor(folder, key, entry, metadata.storage_data)
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
    except ArtefactError:
        raise
    except Exception as error:  # a pickle parser raises whatever a wrong byte leads it to
        raise ArtefactError(f"{path} is not the index of a distributed checkpoint: {error}") from None
    return ShardIndex(tensors)


def _sharded_tensor(folder: Path, key: str, entry: TensorStorageMetadata, storage: dict[Any, Any]) -> ShardedTensor:
    infos = {tuple(index.offset): info for index, info in storage.items() if index.fqn == key}
    chunks = []
    for part in sorted(entry.chunks, key=lambda c: tuple(c.offsets)):
        if any(part.offsets[1:]) or tuple(part.sizes[1:]) != tuple(entry.size[1:]):
            raise ArtefactError(f"{folder}: {key} is sharded by columns; only row-wise shards can be imported")
        info = infos[tuple(part.offsets)]
        if Path(info.relative_path).name != info.relative_path:
            raise ArtefactError(f"{folder}: {key} names a shard outside its folder: {info.relative_path!r}")
        if getattr(info, "transform_descriptors", None):
            raise ArtefactError(
                f"{folder}: {key} is stored with transforms {info.transform_descriptors}; save it without"
            )
        chunks.append(
            _Chunk(
                first_row=part.offsets[0],
                rows=part.sizes[0],
                file=folder / info.relative_path,
                offset=info.offset,
                length=info.length,
            )
        )
    _check_cover(folder, key, entry.size[0], chunks)
    return ShardedTensor(key=key, shape=tuple(entry.size), dtype=entry.properties.dtype, chunks=tuple(chunks))


def _check_cover(folder: Path, key: str, rows: int, chunks: list[_Chunk]) -> None:
    expected = 0
    for chunk in chunks:
        if chunk.first_row != expected:
            raise ArtefactError(f"{folder}: {key} has shards at row {chunk.first_row} where row {expected} is due")
        expected += chunk.rows
    if expected != rows:
        raise ArtefactError(f"{folder}: the shards of {key} hold {expected} rows, the table has {rows}")


def _read_chunk(chunk: _Chunk, key: str) -> torch.Tensor:
    what = f"{chunk.file}: shard of {key}"
    try:
        with chunk.file.open("rb") as stream:
            # A part, since a shard may fill half the memory: its bytes are read into the tensor and nowhere else.
            tensor = load_tensors(FilePart(stream, chunk.offset, chunk.length), what)
    except OSError as error:
        raise ArtefactError(f"{what} cannot be read ({error.strerror})") from None
    if not isinstance(tensor, torch.Tensor):
        raise ArtefactError(f"{what} holds {type(tensor).__name__}, not a tensor")
    return tensor
