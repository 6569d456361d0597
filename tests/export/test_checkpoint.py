"""Reading checkpoints: every known form, damage named, nothing unpickled."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, TensorStorageMetadata

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.table_format import write_shard
from hstu_trt.export.checkpoint import Checkpoint, TableSource, load_checkpoint, pair_id
from hstu_trt.export.dcp_files import _MetadataUnpickler

STATE = load_file(GOLDEN / "caseA" / "state_dict.safetensors")
TABLE_KEY = "_embedding_collection.embeddings.{}.weight"


def rows(table: TableSource) -> np.ndarray:
    return np.concatenate(list(table.blocks()))


def all_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tables = {TABLE_KEY.format(name): torch.from_numpy(rows(t)) for name, t in checkpoint.tables.items()}
    return checkpoint.dense | tables


def assert_is_case_a(checkpoint: Checkpoint) -> None:
    found = all_tensors(checkpoint)
    assert found.keys() == STATE.keys()
    assert len(found) == 75
    for key, value in STATE.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def write_plain(folder: Path) -> Path:
    torch.save(STATE, folder / "state.pt")
    return folder / "state.pt"


def write_nested(folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in STATE.items()}}, folder / "nested.pt")
    return folder / "nested.pt"


def write_tables_in_the_dense_file(folder: Path) -> Path:
    """Tables that were data-parallel in training: the sparse shards are there, and empty."""
    (folder / "12" / "sparse").mkdir(parents=True)
    torch.save({"dense_dict": STATE, "optimizer_dict": {}}, folder / "12" / "non_sparse.ckpt")
    return folder


def write_prefixed(folder: Path) -> Path:
    save_file({f"module.{k}": v for k, v in STATE.items()}, folder / "ddp.safetensors")
    return folder / "ddp.safetensors"


def write_parameters(folder: Path) -> Path:
    """As the reference's research trainer names it, with parameters that want a gradient."""
    wanting = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in STATE.items()}
    torch.save({"model_state_dict": wanting, "optimizer_state_dict": {}}, folder / "model_ep3")
    return folder / "model_ep3"


FORMS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda _: GOLDEN / "caseA" / "state_dict.safetensors",
    "checkpoint directory": lambda _: GOLDEN / "ckptA",
    "batch directory": lambda _: GOLDEN / "ckptA" / "0",
    "state dict": write_plain,
    "nested, from DataParallel": write_nested,
    "prefixed safetensors": write_prefixed,
    "parameters": write_parameters,
    "tables in the dense file": write_tables_in_the_dense_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_75_equal_tensors(form: str, tmp_path: Path) -> None:
    assert_is_case_a(load_checkpoint(FORMS[form](tmp_path)))


def test_the_newest_batch_directory_is_read(tmp_path: Path) -> None:
    for batch, value in (("9", 1.0), ("10", 2.0)):
        (tmp_path / batch).mkdir()
        torch.save({"dense_dict": {"_x": torch.tensor(value)}}, tmp_path / batch / "non_sparse.ckpt")
    assert load_checkpoint(tmp_path).dense["_x"] == 2.0


def save_sharded(folder: Path, table: Tensor, sizes: list[int]) -> None:
    """Writes a table as uneven row-wise shards, with PyTorch's own writer and an index put together from them."""
    key = "sparse_dict." + TABLE_KEY.format("item_id")
    folder.mkdir(parents=True)
    chunks, storage, first = [], {}, 0
    for number, size in enumerate(sizes):
        part = folder / f"part{number}"
        dcp.save({key: table[first : first + size].clone()}, checkpoint_id=part, no_dist=True)
        metadata = dcp.FileSystemReader(part).read_metadata()
        [(index, info)] = metadata.storage_data.items()
        name = f"__{number}_0.distcp"
        (part / info.relative_path).rename(folder / name)
        offset = torch.Size([first, 0])
        chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size([size, table.shape[1]])))
        storage[dataclasses.replace(index, offset=offset)] = dataclasses.replace(info, relative_path=name)
        entry = metadata.state_dict_metadata[key]
        shutil.rmtree(part)
        first += size
    assert isinstance(entry, TensorStorageMetadata)
    # Chunks are listed in the order in which ranks happened to report, not in row order.
    entry = dataclasses.replace(entry, size=table.shape, chunks=chunks[::-1])
    metadata = dataclasses.replace(metadata, state_dict_metadata={key: entry}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, Tensor]:
    """A checkpoint with one table in four uneven shards."""
    table = torch.arange(26, dtype=torch.float16).reshape(13, 2)
    save_sharded(tmp_path / "0" / "sparse", table, [4, 4, 4, 1])
    torch.save({"dense_dict": {}}, tmp_path / "0" / "non_sparse.ckpt")
    return tmp_path, table


def test_uneven_shards_are_placed_by_their_offsets(sharded: tuple[Path, Tensor]) -> None:
    folder, table = sharded
    read = load_checkpoint(folder).tables["item_id"]
    assert (read.rows, read.dim, read.dtype) == (13, 2, "float16")
    np.testing.assert_array_equal(rows(read), table.numpy())
    assert sum(1 for _ in read.blocks()) == 4, "one shard at a time, never the whole table"


def test_a_shard_is_held_once_while_it_is_written(tmp_path: Path) -> None:
    save_sharded(tmp_path / "0" / "sparse", torch.ones(1 << 15, 64, dtype=torch.float16), [1 << 15])
    torch.save({"dense_dict": {}}, tmp_path / "0" / "non_sparse.ckpt")
    source = load_checkpoint(tmp_path).tables["item_id"]
    tracemalloc.start()  # counts everything but the tensor itself
    try:
        write_shard(tmp_path / "rows.safetensors", source.dtype, source.dim, source.blocks())
        assert tracemalloc.get_traced_memory()[1] < source.rows * source.dim
    finally:
        tracemalloc.stop()


def test_a_damaged_shard_is_named(sharded: tuple[Path, Tensor]) -> None:
    folder, _ = sharded
    (folder / "0/sparse/__2_0.distcp").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=r"__2_0\.distcp: shard of .*item_id.* is damaged"):
        rows(load_checkpoint(folder).tables["item_id"])


def test_a_missing_shard_is_named(sharded: tuple[Path, Tensor]) -> None:
    folder, _ = sharded
    (folder / "0/sparse/__1_0.distcp").unlink()
    with pytest.raises(ArtefactError, match=r"__1_0\.distcp: shard of .* cannot be read"):
        rows(load_checkpoint(folder).tables["item_id"])


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("place", ["0/sparse/.metadata", "0/non_sparse.ckpt", "0/sparse/__0_0.distcp", "state.pt"])
def test_hostile_pickles_are_refused_and_never_run(sharded: tuple[Path, Tensor], tmp_path: Path, place: str) -> None:
    folder, _ = sharded
    trace = tmp_path / "trace"
    (folder / place).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ArtefactError):
        checkpoint = load_checkpoint(folder / place if place == "state.pt" else folder)
        rows(checkpoint.tables["item_id"])
    assert not trace.exists()


class Lookup:
    """Pickles as ``getattr(owner, name)``, as early releases of Python 3.11 pickle enum members."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple:
        return getattr, self.arguments


def test_enum_members_pickled_as_attributes_are_read() -> None:
    pickled = pickle.dumps([Lookup(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")])
    assert _MetadataUnpickler(io.BytesIO(pickled)).load() == [_MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST]


@pytest.mark.parametrize(("owner", "name"), [(_MEM_FORMAT_ENCODING, "__init__"), (torch.Size, "count"), ("", "join")])
def test_other_attributes_are_not(owner: object, name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint index needs"):
        _MetadataUnpickler(io.BytesIO(pickle.dumps(Lookup(owner, name)))).load()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"garbage" * 100])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_garbage_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=name):
        load_checkpoint(tmp_path / name)


def test_missing_and_empty_sources_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"expected non_sparse\.ckpt"):
        load_checkpoint(tmp_path)


def test_the_pair_id_is_that_of_the_dense_weights():
    dense = {"a": torch.arange(4.0), "b": torch.tensor(2.5, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}
    found = pair_id(dense)
    assert found == pair_id(dict(reversed(dense.items())))
    changed = [dense | {"a": torch.arange(4.0).nextafter(torch.tensor(9.0))}, dense | {"d": torch.ones(1)}]
    changed += [dense | {"a": torch.arange(4.0).reshape(2, 2)}, {"a": dense["a"], "b": dense["b"]}]
    assert len({found, *(pair_id(one) for one in changed)}) == 5
