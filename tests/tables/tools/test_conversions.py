"""`tables convert` with rules of ids, `quantise`, `verify` and `publish`, on small tables."""

import dataclasses
import json

import numpy as np
import pytest
from table_tools import COUNTS, KINDS, ROWS, convert, read, rows_of, run

from hstu_trt.contract.config_json import config_to_json
from hstu_trt.contract.manifest import write_manifest
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.presets import debug
from hstu_trt.contract.shards import write_vector
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.tables.host import HostTables, LookupOptions


def test_ranked_tables_answer_the_same_rows(folder):
    assert convert(folder, "ranked", f"--rank-by=items={folder}/counts.npy", "--default-row=items=3") == 0
    table = read(folder / "ranked").tables["items"]
    assert (table.row_order, table.ids.hash, len(table.shards)) == ("rank", "permutation", 3)
    np.testing.assert_array_equal(rows_of(folder / "ranked"), ROWS)
    stored = np.fromfile(folder / "ranked" / table.shards[0].file, np.float32, 8, offset=4096)
    np.testing.assert_array_equal(stored, ROWS[COUNTS.argmax()])
    options = LookupOptions(policy="default_row")
    rows, status = HostTables.open(folder / "ranked").lookup_with_status("items", np.asarray([40, 7]), options)
    np.testing.assert_array_equal(rows, ROWS[[3, 7]])
    assert status.tolist() == [4, 1]
    assert run("verify", folder / "ranked") == 0


def test_hashed_tables_take_any_id(folder):
    assert convert(folder, "hashed", "--hash=items=splitmix64:7") == 0
    tables = HostTables.open(folder / "hashed")
    assert (tables.tables["items"].ids.seed, tables.tables["kinds"].ids.hash) == (7, "none")
    assert tables.lookup("items", np.asarray([-5, 2**62])).shape == (2, 8)
    assert not tables.bad_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hash=items=md5"], "choose splitmix64"),
        (["--hash=items=splitmix64:x"], "expected a whole number >= 0"),
        (["--hash=others=splitmix64"], "no --table others=FILE"),
        (["--hash=items=splitmix64", "--rank-by=items={folder}/counts.npy"], "give --hash or --rank-by"),
        (["--rank-by=kinds={folder}/counts.npy"], "a count for each of the 5 ids of 'kinds', got [40]"),
        (["--rank-by=items={folder}/missing.npy"], "missing.npy is not a .npy file"),
        (["--default-row=items=40"], "which has 40 rows"),
        (["--pair-with={folder}/model"], "holds no onnx"),
    ],
)
def test_wrong_id_rules_are_refused(folder, capsys, arguments, message):
    given_ = [argument.format(folder=folder) for argument in arguments]
    assert convert(folder, "out", *given_) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_table_belongs_to_an_exported_model(folder, capsys):
    (folder / "model").mkdir()
    write_manifest(folder / "model", kind="onnx", made_by="test", files=[], facts={"pair_id": "abc"})
    assert convert(folder, "out", f"--pair-with={folder / 'model'}") == 0
    assert read(folder / "out").pair_id == "abc"
    write_manifest(folder / "model", kind="onnx", made_by="test", files=[], facts={})
    assert convert(folder, "out", "--force", f"--pair-with={folder / 'model'}") == 2
    assert "has no pair id" in capsys.readouterr().err


def test_features_are_the_models_where_none_are_given(folder):
    (folder / "model").mkdir()
    table = TableConfig(name="items", rows=40, dim=8, dtype="float32", features=("item", "candidate"))
    config = config_to_json(dataclasses.replace(debug(), tables=(table,)))
    facts = {"pair_id": "abc", "config": config}
    write_manifest(folder / "model", kind="onnx", made_by="test", files=[], facts=facts)
    pair = f"--pair-with={folder / 'model'}"
    assert convert(folder, "out", pair) == 0
    found = read(folder / "out").tables
    assert (found["items"].features, found["kinds"].features) == (("item", "candidate"), ("kinds",))
    assert convert(folder, "out", "--force", pair, "--features=items=candidate") == 0
    assert read(folder / "out").tables["items"].features == ("candidate",)


@pytest.mark.parametrize(("to", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_quantised_tables_keep_rows_ids_and_features(folder, capsys, to, bound):
    convert(folder, "ranked", f"--rank-by=items={folder}/counts.npy")
    capsys.readouterr()
    assert run("quantise", folder / "ranked", "--to", to, "--out", folder / "small", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    error = np.sqrt(((rows_of(folder / "small") - ROWS) ** 2).sum() / (ROWS**2).sum())
    assert 0 < error < bound
    assert report["tables"][0]["relative_rmse"] == pytest.approx(error, rel=1e-4)
    before, after = read(folder / "ranked"), read(folder / "small")
    for name in ("rows", "dim", "features", "ids", "row_order"):
        assert getattr(before.tables["items"], name) == getattr(after.tables["items"], name)
    assert after.version == "small"
    assert run("verify", folder / "small") == 0


def test_one_table_is_quantised_and_the_others_copied(folder):
    assert run("quantise", folder / "v1", "--table", "items", "--out", folder / "v2") == 0
    assert [table.dtype for table in read(folder / "v2").tables.values()] == ["int8", "float16"]
    np.testing.assert_array_equal(rows_of(folder / "v2", "kinds", 5), KINDS.astype(np.float32))


def test_the_error_is_reported_without_writing(folder, capsys):
    capsys.readouterr()
    assert run("quantise", folder / "v1") == 0
    out = capsys.readouterr().out
    assert "relative RMSE" in out
    assert "nothing was written" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v1", "--table", "users"], "no table 'users'"),
        (["v1", "--out", "{folder}/v1"], "exists; --force replaces it"),
        (["missing"], "holds no tables"),
    ],
)
def test_wrong_quantisations_are_refused(folder, capsys, arguments, message):
    name, *more = arguments
    assert run("quantise", folder / name, *(one.format(folder=folder) for one in more)) == 2
    assert message in capsys.readouterr().err


def test_quantised_tables_are_not_quantised_again(folder, capsys):
    run("quantise", folder / "v1", "--out", folder / "v2")
    assert run("quantise", folder / "v2") == 2
    assert "table items is int8 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(np.nan, "scale of row 20 is nan"), (np.inf, "is inf"), (-1.0, "is -1.0, it must be finite")]
)
def test_verify_finds_scales_that_are_none(folder, capsys, value, text):
    config = TableConfig(name="items", rows=40, dim=8, dtype="float32", features=("items",))
    from hstu_trt.tables.quantisers import quantise_rows

    block = quantise_rows(ROWS, "int8")
    block.scale[20] = value
    stored = write_table(folder / "bad", config, [block], dtype="int8", shard_bytes=16 * 8)
    write_tables_manifest(folder / "bad", [stored], "test", {})
    assert run("verify", folder / "bad") == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "text"), [((3, 40), "id 3 is permuted to row 40, it has 40 rows"), ((3, 3), "no id leads to row")]
)
def test_verify_finds_permutations_that_are_none(folder, capsys, change, text):
    convert(folder, "ranked", f"--rank-by=items={folder}/counts.npy")
    row_of_id = np.argsort(np.argsort(-COUNTS, kind="stable")).astype(np.uint32)
    row_of_id[change[0]] = change[1] if change[1] == 40 else row_of_id[4]
    write_vector(folder / "ranked/items/row_of_id.safetensors", "row_of_id", row_of_id)
    found = read(folder / "ranked")
    write_tables_manifest(folder / "ranked", found.tables.values(), "test", {})
    assert run("verify", folder / "ranked", "--json") == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert json.loads(captured.out[captured.out.rindex("{") :])["wrong_values"]


def test_publish_and_take_back(folder, capsys):
    run("quantise", folder / "v1", "--out", folder / "v2")
    for version, dtype in (("v1", "float32"), ("v2", "int8"), ("v1", "float32")):
        assert run("publish", folder / version) == 0
        assert HostTables.open(folder).tables["items"].dtype == dtype
    capsys.readouterr()
    assert run("show", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == "v1"
    assert run("publish", folder / "v9") == 2
