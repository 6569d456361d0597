"""Where Meta's checkpoints keep what: files and keys of a DistributedModelParallel checkpoint directory.

0/non_sparse.ckpt     torch.save of {"dense_dict": {key: tensor}, ...}; tables that were data-parallel stand here too
0/sparse/.metadata    index of a torch.distributed.checkpoint of the sharded tables
0/sparse/__0_0.distcp their rows
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

DENSE_FILE = "non_sparse.ckpt"
DENSE_KEY = "dense_dict"
SPARSE_FOLDER = "sparse"
INDEX_FILE = ".metadata"
SPARSE_PREFIX = "sparse_dict."
TABLE_PREFIX = "_embedding_collection.embeddings."
TABLE_SUFFIX = ".weight"


def table_of_key(key: str) -> str | None:
    """The embedding table that a key of a checkpoint holds; None for a dense weight."""
    plain = key.removeprefix("module.").removeprefix(SPARSE_PREFIX)
    if plain.startswith(TABLE_PREFIX) and plain.endswith(TABLE_SUFFIX):
        return plain.removeprefix(TABLE_PREFIX).removesuffix(TABLE_SUFFIX)
    return None


def table_key(name: str) -> str:
    """The key under which a state dict holds an embedding table; ``table_of_key`` reads it."""
    return TABLE_PREFIX + name + TABLE_SUFFIX


def checkpoint_root(path: Path) -> Path | None:
    """The directory with ``non_sparse.ckpt``: the given one, or its newest batch directory; None if there is none."""
    if (path / DENSE_FILE).is_file():
        return path
    batches = [p for p in path.iterdir() if p.name.isdecimal() and (p / DENSE_FILE).is_file()]
    return max(batches, key=lambda p: int(p.name), default=None)


class FilePart(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            self._stream.seek(self._start + self._at)
            count: int = self._stream.readinto(view[: max(0, self._length - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return count


def refuse_packed(archive: zipfile.ZipFile) -> None:
    """That every member is stored as it is, as torch.save does. Raises ValueError.

    What is packed may unpack to any size, and readers that map an archive take its packed bytes for the tensor's.
    """
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"its member {info.filename[:80]!r} is compressed")
