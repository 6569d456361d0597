"""Where Meta's checkpoints keep what: files and keys of a DistributedModelParallel checkpoint directory.

0/non_sparse.ckpt     torch.save of {"dense_dict": {key: tensor}, ...}; tables that were data-parallel stand here too
0/sparse/.metadata    index of a torch.distributed.checkpoint of the sharded tables
0/sparse/__0_0.distcp their rows
"""

from __future__ import annotations

from pathlib import Path

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


def checkpoint_root(path: Path) -> Path | None:
    """The directory with ``non_sparse.ckpt``: the given one, or its newest batch directory; None if there is none."""
    if (path / DENSE_FILE).is_file():
        return path
    batches = [p for p in path.iterdir() if p.name.isdigit() and (p / DENSE_FILE).is_file()]
    return max(batches, key=lambda p: int(p.name), default=None)
