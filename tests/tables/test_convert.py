"""``hstu-trt tables``: matrices in files become a tables folder that shows, verifies and looks up the same rows."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from hstu_trt.contract.cli import main as command_line
from hstu_trt.tables import convert as convert_module
from hstu_trt.tables import terminal
from hstu_trt.tables.host import HostTables

ITEMS = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
KINDS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float16)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "items.npy", ITEMS)
    save_file({"kinds": KINDS, "other": ITEMS}, tmp_path / "two.safetensors")
    save_file({"only": ITEMS}, tmp_path / "one.safetensors")
    return tmp_path


def tables(*arguments):
    return command_line(["tables", *(str(argument) for argument in arguments)])


def convert(files, *more, source="items.npy"):
    return tables("convert", "--table", f"items={files}/{source}", "--out", files / "out", *more)


def stored_rows(folder, table, rows, dtype="float32"):
    return HostTables.open(folder, verify=True).lookup(table, np.arange(rows), dtype=dtype)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_two_tables_with_features_and_shards(files, capsys):
    arguments = ["--table", f"kinds={files}/two.safetensors:kinds", "--features", "items=item,candidate"]
    assert convert(files, *arguments, "--shard-rows", "4") == 0
    opened = HostTables.open(files / "out", verify=True)
    assert [len(table.shards) for table in opened.tables.values()] == [3, 1]
    ids = np.asarray([[10, 0, 2]])
    rows = opened.lookup_features(["item", "candidate", "kinds"], ids)
    np.testing.assert_array_equal(rows, np.concatenate([ITEMS[10], ITEMS[0], KINDS[2].astype(np.float32)])[None])
    assert "wrote" in capsys.readouterr().out
    assert not hidden(files)


@pytest.mark.parametrize("source", ["items.npy", "one.safetensors", "two.safetensors:other"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sources_and_dtypes(files, source, dtype):
    assert convert(files, "--dtype", dtype, source=source) == 0
    np.testing.assert_array_equal(stored_rows(files / "out", "items", 11, dtype), ITEMS.astype(dtype))


def test_the_source_s_dtype_is_the_default(files):
    assert convert(files, source="two.safetensors:kinds") == 0
    assert HostTables.open(files / "out").tables["items"].dtype == "float16"


def test_bfloat16_becomes_float32_exactly(files):
    bits = (ITEMS.view(np.uint32) >> 16).astype(np.uint16)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [11, 4], "data_offsets": [0, 88]}}).encode()
    # An odd header length: the payload is not aligned.
    (files / "bf16.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    assert convert(files, source="bf16.safetensors") == 0
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(stored_rows(files / "out", "items", 11), expected)


def test_fortran_order_is_read_as_numpy_reads_it(files):
    np.save(files / "items.npy", np.asfortranarray(ITEMS))
    assert convert(files, "--shard-rows", "5") == 0
    np.testing.assert_array_equal(stored_rows(files / "out", "items", 11), ITEMS)


def test_memory_stays_far_below_the_table(files):
    np.save(files / "items.npy", np.zeros((200_000, 128), np.float32))
    tracemalloc.start()
    assert convert(files) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20 < 200_000 * 128 * 4


def test_dry_run_prints_the_plan_and_writes_nothing(files, capsys):
    assert convert(files, "--shard-rows", "4", "--dtype", "float16", "--dry-run", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["tables"]
    assert (row["rows"], row["dim"], row["dtype"], row["bytes"], row["shards"]) == (11, 4, "float16", 88, 3)
    assert (row["source dtype"], row["features"]) == ("float32", ["items"])
    assert not (files / "out").exists()


def test_show_lists_what_was_written(files, capsys):
    convert(files, "--features", "items=item,candidate", "--shard-rows", "6")
    capsys.readouterr()
    assert tables("show", files / "out", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["tables"]
    assert row == {
        "table": "items",
        "rows": 11,
        "dim": 4,
        "dtype": "float32",
        "bytes": 176,
        "shards": 2,
        "features": ["item", "candidate"],
    }
    assert tables("show", files / "out") == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["table", "rows", "dim", "dtype", "size", "shards", "features"]
    assert line.split() == ["items", "11", "4", "float32", "176", "B", "2", "item,", "candidate"]


def test_verify_names_every_damaged_shard(files, capsys):
    convert(files, "--shard-rows", "3")
    assert tables("verify", files / "out") == 0
    assert "1 tables, 4 shards" in capsys.readouterr().out
    for number in (1, 3):
        shard = files / "out" / "items" / f"0000{number}.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert tables("verify", files / "out", "--json") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["damaged"] == ["items/00001.safetensors", "items/00003.safetensors"]
    assert "items/00001.safetensors, items/00003.safetensors" in captured.err


def test_verify_refuses_a_short_shard(files, capsys):
    convert(files)
    shard = files / "out" / "items" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert tables("verify", files / "out") == 2
    assert "items/00000.safetensors has 4271 bytes, its manifest says 4272" in capsys.readouterr().err


def test_long_work_shows_progress_on_stderr(capsys, monkeypatch):
    progress = terminal.Progress(100, "hashed", every_s=0.0)
    progress.add("items/00000.safetensors", 40)
    progress.end()
    assert "hashed 40 B of 100 B" in capsys.readouterr().err
    terminal.Progress(100, "hashed").end()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "items"], "expected NAME="),
        (["--table", "a=missing.npy"], "missing.npy: no such file"),
        (["--table", "../up={files}/items.npy"], "table name '../up'"),
        (["--table", "a={files}/two.safetensors"], "holds 2 tensors (kinds, other)"),
        (["--table", "a={files}/two.safetensors:kind"], "holds no tensor 'kind'"),
        (["--table", "a={files}/cube.npy"], "got shape [2, 3, 4]"),
        (["--table", "a={files}/none.npy"], "got shape [0, 4]"),
        (["--table", "a={files}/ints.npy"], "got int64"),
        (["--table", "a={files}/objects.npy"], "is not a .npy file"),
        (["--table", "a={files}/short.npy"], "is not a .npy file"),
        (["--table", "a={files}/notes.txt"], ".npy and .safetensors"),
        (["--table", "a={files}/nan.npy"], "holds nan at [1, 2]"),
        (["--table", "a={files}/large.npy", "--dtype", "float16"], "holds 100000.0 at [0, 0], which is inf in float16"),
        (["--table", "a={files}/items.npy", "--table", "a={files}/items.npy"], "table 'a' is given twice"),
        (["--table", "a={files}/items.npy", "--features", "b=x"], "no --table b=FILE"),
        (["--table", "a={files}/items.npy", "--features", "a=x,,y"], "a feature is empty or given twice"),
        (
            ["--table", "a={files}/items.npy", "--table", "b={files}/items.npy", "--features", "b=a"],
            "feature 'a' is in two tables, 'a' and 'b'",
        ),
        (["--table", "a={files}/items.npy", "--shard-rows", "0"], "at least one row, got 0"),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(files, capsys, arguments, message):
    np.save(files / "cube.npy", np.zeros((2, 3, 4), np.float32))
    np.save(files / "none.npy", np.zeros((0, 4), np.float32))
    np.save(files / "ints.npy", np.zeros((2, 4), np.int64))
    np.save(files / "objects.npy", np.asarray([[None]]), allow_pickle=True)
    np.save(files / "large.npy", np.full((2, 2), 1e5, np.float32))
    np.save(files / "nan.npy", np.where(np.arange(12).reshape(3, 4) == 6, np.nan, 1).astype(np.float32))
    (files / "short.npy").write_bytes((files / "items.npy").read_bytes()[:-7])
    (files / "notes.txt").write_text("rows")
    before = sorted(files.iterdir())
    given = [argument.format(files=files) for argument in arguments]
    assert tables("convert", *given, "--out", files / "out") == 2
    assert message in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


def test_an_existing_folder_needs_force_and_must_be_tables(files, capsys):
    assert convert(files) == 0
    assert convert(files) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert convert(files, "--force", source="two.safetensors:kinds") == 0
    assert HostTables.open(files / "out").tables["items"].rows == 3
    (files / "mine").mkdir()
    (files / "mine" / "thesis.txt").write_text("years")
    assert tables("convert", "--table", f"a={files}/items.npy", "--out", files / "mine", "--force") == 2
    assert "holds something else than tables" in capsys.readouterr().err
    assert (files / "mine" / "thesis.txt").exists()


def test_a_failed_replacement_keeps_the_old_folder(files):
    convert(files)
    np.save(files / "items.npy", np.full((2, 4), np.inf, np.float32))
    assert convert(files, "--force") == 2
    np.testing.assert_array_equal(stored_rows(files / "out", "items", 11), ITEMS)
    assert not hidden(files)


def test_a_full_disk_is_noticed_before_writing(files, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda folder: usage)
    assert convert(files) == 2
    assert "needs 176 B, but" in capsys.readouterr().err
