"""Where the tensors of PyTorch's files lie: read without PyTorch, and without running anything of the file.

``torch.save`` writes a zip archive whose ``data.pkl`` describes the tensors and whose other members are their plain
bytes; a distributed checkpoint's shards are such archives end to end, with a pickled index beside them. The unpicklers
here know a short list of names, each of which stands for an inert record.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hstu_trt.contract.checkpoint_layout import INDEX_FILE, FilePart, refuse_packed
from hstu_trt.contract.errors import ArtefactError

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
_MOST_PICKLE_BYTES = 1 << 30
_LOCAL_HEADER = 30


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """A contiguous tensor in a file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class _Record:
    """Stands for an instance of any class on the list: keeps its state, does nothing."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update({str(key): value for key, value in state.items()})


class _Unpickler(pickle.Unpickler):
    """Resolves the names of a list, and no others."""

    def __init__(
        self, stream: BinaryIO, names: Mapping[tuple[str, str], Any], place: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(stream)
        self._names, self._place = names, place

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no table needs")
        return self._names[module, name]

    def persistent_load(self, identity: Any) -> Any:
        if self._place is None:
            raise pickle.UnpicklingError("it refers to storages outside of itself")
        return self._place(*identity)


def _nothing(*_: object) -> None:
    return None


_DTYPES = {("torch", name): name for name in (*_STORAGES.values(), "uint8")}
_INDEX_NAMES: dict[tuple[str, str], Any] = {
    **_DTYPES,
    **{
        ("torch.distributed.checkpoint.metadata", name): _Record
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata",
        )
    },
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _nothing,
    ("torch", "Size"): tuple,
    ("torch", "device"): _nothing,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _nothing,
    # By getattr early releases of Python 3.11 pickle enum members.
    ("builtins", "getattr"): _nothing,
}  # fmt: skip


def read_index(folder: Path) -> dict[str, list[TensorPlace]]:
    """The tensors of a distributed checkpoint by key: their row-wise chunks in order. Raises ArtefactError."""
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream, _INDEX_NAMES).load()
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        infos = {(place.fqn, tuple(place.offset or ())): info for place, info in storage.items()}
        return {
            str(key): _chunks(folder, str(key), entry, infos)
            for key, entry in entries.items()
            if hasattr(entry, "chunks")
        }
    except ArtefactError:
        raise
    except Exception as error:  # an unpickler raises whatever a wrong byte leads it to
        raise ArtefactError(f"{path} is not the index of a distributed checkpoint: {error}") from None


def _chunks(folder: Path, key: str, entry: Any, infos: Mapping[tuple[str, tuple[int, ...]], Any]) -> list[TensorPlace]:
    found, due = [], 0
    for chunk in sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets)):
        if any(chunk.offsets[1:]) or tuple(chunk.sizes[1:]) != tuple(entry.size[1:]):
            raise ArtefactError(f"{folder}: {key} is sharded by columns; only row-wise shards can be imported")
        info = infos[key, tuple(chunk.offsets)]
        if Path(info.relative_path).name != info.relative_path:
            raise ArtefactError(f"{folder}: {key} names a shard outside its folder: {info.relative_path!r}")
        if getattr(info, "transform_descriptors", None):
            raise ArtefactError(f"{folder}: {key} is stored with transforms; save it without")
        if chunk.offsets[0] != due:
            raise ArtefactError(f"{folder}: {key} has shards at row {chunk.offsets[0]} where row {due} is due")
        due += chunk.sizes[0]
        tensor = read_archive(folder / info.relative_path, info.offset, info.length)
        if not isinstance(tensor, TensorPlace) or tensor.shape != tuple(chunk.sizes):
            raise ArtefactError(f"{folder / info.relative_path}: shard of {key} is not {list(chunk.sizes)}, as indexed")
        found.append(tensor)
    if due != entry.size[0]:
        raise ArtefactError(f"{folder}: the shards of {key} hold {due} rows, the table has {entry.size[0]}")
    return found


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What ``torch.save`` wrote in a file, or in a part of it, with a TensorPlace for each tensor.

    Raises ArtefactError on anything damaged, compressed, sparse or strided.
    """
    try:
        size = path.stat().st_size
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise ValueError(f"bytes {start} to {start + length} of {size}")
        with path.open("rb") as stream, zipfile.ZipFile(FilePart(stream, start, length)) as archive:
            return _Archive(path, start, stream, archive).load()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # an unpickler raises whatever a wrong byte leads it to
        raise ArtefactError(f"{path} from byte {start} is not what torch.save writes: {error}") from None


class _Archive:
    """The members of one archive."""

    def __init__(self, path: Path, start: int, stream: BinaryIO, archive: zipfile.ZipFile) -> None:
        refuse_packed(archive)
        self._path, self._start, self._stream, self._archive = path, start, stream, archive
        self._root = archive.namelist()[0].partition("/")[0]

    def load(self) -> Any:
        info = self._archive.getinfo(f"{self._root}/data.pkl")
        if info.file_size > _MOST_PICKLE_BYTES:
            raise ValueError(f"data.pkl of {info.file_size} bytes")
        if self._archive.read(f"{self._root}/byteorder") != b"little":
            raise ValueError("its bytes are in big-endian order")
        names = {
            **_DTYPES,
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch", "Size"): tuple,
            ("torch", "device"): _nothing,
            ("collections", "OrderedDict"): OrderedDict,
        }
        return _Unpickler(io.BytesIO(self._archive.read(info)), names, self._storage).load()  # type: ignore[arg-type]

    def _storage(self, kind: str, dtype: str, key: str, *_: object) -> TensorPlace:
        """The bytes of a storage: ``shape`` is its number of elements."""
        info = self._archive.getinfo(f"{self._root}/data/{key}")
        if kind != "storage":
            raise ValueError(f"{key!r} is no storage")
        self._stream.seek(self._start + info.header_offset)
        header = self._stream.read(_LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = self._start + info.header_offset + _LOCAL_HEADER + name_length + extra_length
        return TensorPlace(
            path=self._path, offset=offset, shape=(info.file_size // _ITEM_BYTES.get(dtype, 1),), dtype=dtype
        )

    @staticmethod
    def _tensor(
        storage: TensorPlace, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> TensorPlace | None:
        """A tensor within its storage; None where it is not contiguous, which no table is."""
        elements, dense = 1, True
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            dense &= size <= 1 or step == elements
            elements *= size
        if min((first, *shape)) < 0 or first + elements > storage.shape[0]:
            raise ValueError(f"a tensor {list(shape)} reaches beyond its storage of {storage.shape[0]}")
        if not dense:
            return None
        offset = storage.offset + first * _ITEM_BYTES.get(storage.dtype, 1)
        return TensorPlace(path=storage.path, offset=offset, shape=tuple(shape), dtype=storage.dtype)
