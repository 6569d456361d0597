"""Tables out of Meta's checkpoint directories, read without PyTorch: the same rows, a bounded memory, no pickle run."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.export.checkpoint import load_checkpoint
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.sources import open_matrix
from hstu_trt.tables.torch_files import read_archive, read_index

KEY = "sparse_dict._embedding_collection.embeddings.{}.weight"


def convert(*arguments):
    return command_line(["tables", "convert", *(str(argument) for argument in arguments)])


def test_the_rows_are_those_that_export_reads(golden, tmp_path):
    checkpoint = load_checkpoint(golden / "ckptA")
    tables = [f"--table={name}={golden / 'ckptA'}" for name in checkpoint.tables]
    assert convert(*tables, "--out", tmp_path / "out") == 0
    opened = HostTables.open(tmp_path / "out", verify=True)
    assert set(opened.tables) == set(checkpoint.tables) == {"item_id", "item_category_id", "user_id"}
    for name, source in checkpoint.tables.items():
        assert opened.tables[name].dtype == source.dtype
        expected = np.concatenate(list(source.blocks()))
        np.testing.assert_array_equal(opened.lookup(name, np.arange(source.rows), dtype="float16"), expected)


def test_another_name_and_a_table_that_is_missing(golden, tmp_path, capsys):
    assert convert(f"--table=mine={golden / 'ckptA'}:item_id", "--out", tmp_path / "out") == 0
    assert HostTables.open(tmp_path / "out").tables["mine"].rows == 400
    assert convert(f"--table=mine={golden / 'ckptA'}", "--out", tmp_path / "other") == 2
    assert "has no table 'mine'; it has item_category_id, item_id, user_id" in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_of_torch_save(golden, tmp_path, capsys, nested):
    rows = torch.arange(12, dtype=torch.float16).reshape(4, 3)
    state = {f"module.{KEY.format('mine').removeprefix('sparse_dict.')}": rows, "_dense.weight": torch.zeros(2)}
    torch.save({"epoch": 3, "state_dict": state} if nested else state, tmp_path / "w.pt")
    assert convert(f"--table=mine={tmp_path / 'w.pt'}", "--out", tmp_path / "out") == 0
    opened = HostTables.open(tmp_path / "out", verify=True)
    np.testing.assert_array_equal(opened.lookup("mine", np.arange(4), dtype="float16"), rows.numpy())
    assert convert(f"--table=other={tmp_path / 'w.pt'}:mine", "--out", tmp_path / "again") == 0
    assert convert(f"--table=other={tmp_path / 'w.pt'}", "--out", tmp_path / "not") == 2
    assert "w.pt has no table 'other'; it has mine" in capsys.readouterr().err
    torch.save([rows], tmp_path / "list.pt")
    assert convert(f"--table=mine={tmp_path / 'list.pt'}", "--out", tmp_path / "not") == 2
    assert "expected a state dict" in capsys.readouterr().err


def save_shards(folder, table, cuts):
    """A sharded checkpoint as several training ranks write it: one file per rank, merged into one index."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    key, first, merged = KEY.format("item_id"), 0, None
    folder.mkdir(parents=True)
    for number, rows in enumerate(cuts):
        part = folder / f"part{number}"
        dcp.save({key: table[first : first + rows].clone()}, checkpoint_id=part, no_dist=True)
        metadata = dcp.FileSystemReader(part).read_metadata()
        (part / "__0_0.distcp").rename(folder / f"__{number}_0.distcp")
        (index, info), *_ = metadata.storage_data.items()
        info.relative_path = f"__{number}_0.distcp"
        offset = torch.Size([first, 0])
        index = type(index)(index.fqn, offset, index.index)
        chunk = ChunkStorageMetadata(offsets=offset, sizes=torch.Size([rows, table.shape[1]]))
        if merged is None:
            merged = metadata
            merged.storage_data, merged.state_dict_metadata[key].chunks = {}, []
            merged.state_dict_metadata[key].size = table.shape
        merged.storage_data[index] = info
        merged.state_dict_metadata[key].chunks.insert(0, chunk)
        shutil.rmtree(part)
        first += rows
    (folder / ".metadata").write_bytes(pickle.dumps(merged))
    torch.save({"dense_dict": {}}, folder.parent / "non_sparse.ckpt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_uneven_shards_are_joined_in_their_order(tmp_path, dtype):
    table = torch.randn(13, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_shards(tmp_path / "0/sparse", table, [4, 8, 1])
    source = open_matrix(tmp_path, "item_id")
    np.testing.assert_array_equal(np.concatenate(list(source.blocks("float32"))), table.float().numpy())
    order = np.asarray([12, 0, 3, 4, 11, 5, 1, 2, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(np.concatenate(list(source.blocks("float32", order))), table.float().numpy()[order])


def test_a_data_parallel_table_stands_among_the_dense_weights(tmp_path):
    table = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    dense = {"_embedding_collection.embeddings.item_id.weight": table, "_mlp.bias": torch.ones(2), "step": 3}
    (tmp_path / "7").mkdir()
    torch.save({"dense_dict": dense, "optimizer_dict": {"lr": 0.1}}, tmp_path / "7/non_sparse.ckpt")
    (rows,) = open_matrix(tmp_path, "item_id").blocks("float32")
    assert rows.tolist() == table.tolist()


PEAK = """
import sys
from pathlib import Path
from hstu_trt.contract.cli import main
import hstu_trt.tables.__main__

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])

before = peak()
code = main(sys.argv[1:])
print("peak KiB", peak() - before)
sys.exit(code)
"""


def test_the_peak_memory_of_an_import_is_a_few_blocks(tmp_path):
    """A table of 128 MiB in two shards grows the process by less than one shard, and does not hold it twice."""
    table = torch.ones(1 << 17, 512, dtype=torch.float16)
    save_shards(tmp_path / "0/sparse", table, [1 << 16, 1 << 16])
    arguments = ["tables", "convert", f"--table=item_id={tmp_path}", "--dtype=int8", f"--out={tmp_path / 'out'}"]
    ran = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    # Some growth must be seen, else the measurement is none.
    assert 4 << 10 < int(ran.stdout.split()[-1]) < 48 << 10
    assert HostTables.open(tmp_path / "out").lookup("item_id", np.asarray([(1 << 17) - 1])).tolist() == [[1.0] * 512]


class Evil:
    def __reduce__(self):
        return print, ("run!",)


def test_no_pickle_is_run(tmp_path, capsys):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArtefactError, match=r"refers to (__builtin__|builtins)\.print"):
        read_index(tmp_path / "sparse")
    torch.save({"dense_dict": {"x": Evil()}}, tmp_path / "non_sparse.ckpt")
    with pytest.raises(ArtefactError, match=r"refers to (__builtin__|builtins)\.print"):
        read_archive(tmp_path / "non_sparse.ckpt")
    assert "run!" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (None, None, InputError, "no checkpoint directory"),
        ("non_sparse.ckpt", b"zip?", ArtefactError, "is not what torch.save writes"),
        ("non_sparse.ckpt", {"state": 1}, ArtefactError, "expected a dict with 'dense_dict'"),
        ("non_sparse.ckpt", {"dense_dict": {}}, ConfigError, "has no table 'item_id'; it has none"),
    ],
)
def test_directories_without_tables(tmp_path, name, content, error, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(error, match=message):
        open_matrix(tmp_path, "item_id")


@pytest.mark.parametrize("damage", ["gone", "cut", "foreign"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    save_shards(tmp_path / "0/sparse", torch.ones(6, 2), [3, 3])
    shard = tmp_path / "0/sparse/__1_0.distcp"
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-40])
    else:
        torch.save(torch.ones(5, 2), shard)
    with pytest.raises(ArtefactError, match=r"__1_0\.distcp"):
        open_matrix(tmp_path, "item_id")
