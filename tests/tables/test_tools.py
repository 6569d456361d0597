"""``tables quantise|verify|plan|delta|publish`` and the id rules of ``convert``, on small tables."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_trt.bench.popularity import zipf_ranks
from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError
from hstu_trt.contract.manifest import write_manifest
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import write_vector
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.tables.delta import apply_delta, make_delta, tables_digest
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.plan import GPUS, TableSize, cluster_bytes
from hstu_trt.tables.popularity import Popularity, zipf_share

ROWS = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
KINDS = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float16)
COUNTS = np.random.default_rng(2).permutation(40) * 10


def run(*arguments):
    return command_line(["tables", *(str(argument) for argument in arguments)])


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "items.npy", ROWS)
    np.save(tmp_path / "kinds.npy", KINDS)
    np.save(tmp_path / "counts.npy", COUNTS)
    assert convert(tmp_path, "v1") == 0
    return tmp_path


def convert(folder, out, *more):
    sources = [f"--table=items={folder}/items.npy", f"--table=kinds={folder}/kinds.npy"]
    return run("convert", *sources, "--shard-rows", 16, "--out", folder / out, *more)


def rows_of(folder, table="items", rows=40):
    return HostTables.open(folder).lookup(table, np.arange(rows))


def read(folder):
    return read_tables_folder(folder, regenerate="x")


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


def version(folder, name, rows, kinds=KINDS, dtype=None):
    np.save(folder / "items.npy", rows)
    np.save(folder / "kinds.npy", kinds)
    assert convert(folder, name, "--shard-rows", 16, *(["--dtype", dtype] if dtype else [])) == 0


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
def test_a_delta_holds_the_changed_rows_and_leads_to_the_new_version(folder, capsys, dtype):
    version(folder, "old", ROWS, dtype=dtype)
    changed = np.concatenate([ROWS, ROWS[:3]])
    changed[[0, 15, 16, 39]] += 1
    version(folder, "new", changed, dtype=dtype)
    capsys.readouterr()
    assert run("delta", "make", folder / "old", folder / "new", "--out", folder / "delta", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] == {"items": 7, "kinds": 0}
    assert run("delta", "apply", folder / "old", folder / "delta", "--out", folder / "next") == 0
    assert tables_digest(folder / "next") == tables_digest(folder / "new")
    assert read(folder / "next").version == "next"
    np.testing.assert_array_equal(rows_of(folder / "next", rows=43), rows_of(folder / "new", rows=43))


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_deltas_compose(tmp_path_factory, data):
    """Random changes and further rows: applying each delta gives the next version, bit by bit."""
    folder = tmp_path_factory.mktemp("chain")
    rows = np.arange(data.draw(st.integers(1, 12)), dtype=np.float32)[:, None] * np.ones(2, np.float32)
    shard_bytes = 8 * data.draw(st.integers(1, 5))

    def write(name):
        config = TableConfig(name="t", rows=len(rows), dim=2, dtype="float32", features=("t",))
        write_tables_manifest(folder / name, [write_table(folder / name, config, [rows], shard_bytes)], "test", {})
        return read(folder / name)

    base = reached = write("v0")
    for number in range(1, 4):
        rows = np.concatenate([rows, np.full((data.draw(st.integers(0, 3)), 2), -number, np.float32)])
        for row in data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)):
            rows[row, data.draw(st.integers(0, 1))] = data.draw(st.sampled_from([0.0, -0.0, 1.5, 2.0, np.inf]))
        new = write(f"v{number}")
        make_delta(base, new, folder / f"d{number}", lambda *_: None)
        reached = apply_delta(reached, folder / f"d{number}", folder / f"a{number}", lambda *_: None)
        assert tables_digest(reached.path) == tables_digest(new.path)
        base = new


def test_a_delta_fits_one_base_only(folder, capsys):
    version(folder, "new", ROWS + 1)
    version(folder, "other", ROWS + 2)
    run("delta", "make", folder / "v1", folder / "new", "--out", folder / "delta")
    assert run("delta", "apply", folder / "other", folder / "delta", "--out", folder / "next") == 2
    assert "leads on from version 'v1'" in capsys.readouterr().err
    assert not (folder / "next").exists()


@pytest.mark.parametrize(
    ("rows", "kinds", "dtype", "message"),
    [
        (ROWS[:39], KINDS, None, "cannot remove rows"),
        (ROWS[:, :4], KINDS, None, "dim is 8 in"),
        (ROWS, KINDS, "int8", "dtype is float32 in"),
    ],
)
def test_versions_that_no_delta_connects(folder, capsys, rows, kinds, dtype, message):
    version(folder, "new", rows, kinds, dtype)
    assert run("delta", "make", folder / "v1", folder / "new", "--out", folder / "delta") == 2
    assert message in capsys.readouterr().err


def test_a_delta_replaces_only_a_delta(folder, capsys):
    version(folder, "new", ROWS + 1)
    make = ["delta", "make", folder / "v1", folder / "new", "--out"]
    assert run(*make, folder / "delta") == 0
    assert run(*make, folder / "delta") == 2
    assert run(*make, folder / "delta", "--force") == 0
    assert run(*make, folder / "v1", "--force") == 2
    assert "holds something else than a delta" in capsys.readouterr().err


def damage_delta(folder, change):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def claim_rows(delta, shards):
    """50 rows of items, of which that many more in the last shard."""
    items = delta["result"]["tables"]["items"]
    items["rows"] = 50
    items["shards"][-1][2] += shards


HOSTILE = {
    "no result": (lambda d: d.update(result=3), "its result is 3"),
    "empty result": (lambda d: d.update(result={}), "malformed"),
    "a path out": (
        lambda d: d["result"]["tables"]["items"]["shards"][0].__setitem__(0, "../../items.safetensors"),
        "shards that are not its own",
    ),
    "another content": (
        lambda d: d["result"]["files"]["items/00000.safetensors"].update(sha256="0" * 64),
        "does not match the sha256",
    ),
    "more rows": (lambda d: claim_rows(d, shards=10), "lacks some of the new rows"),
    "more rows than its shards": (lambda d: claim_rows(d, shards=0), "do not add up to its 50 rows"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_deltas_are_refused(folder, change, message):
    version(folder, "new", ROWS + 1)
    make_delta(read(folder / "v1"), read(folder / "new"), folder / "delta", lambda *_: None)
    damage_delta(folder / "delta", change)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ArtefactError, match=message):
        apply_delta(read(folder / "v1"), folder / "delta", folder / "next", lambda *_: None)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("file", ["manifest.json", "items/00000.safetensors"])
def test_mutated_deltas_lead_to_the_new_version_or_nowhere(folder, file):
    version(folder, "new", ROWS + 1)
    old, new = read(folder / "v1"), read(folder / "new")
    make_delta(old, new, folder / "delta", lambda *_: None)
    rng, original = np.random.default_rng(5), (folder / "delta" / file).read_bytes()
    for turn in range(60):
        content = bytearray(original)
        for _ in range(1 + turn % 3):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        (folder / "delta" / file).write_bytes(content)
        try:
            made = apply_delta(old, folder / "delta", folder / "made", lambda *_: None)
        except HstuTrtError:
            continue
        np.testing.assert_array_equal(rows_of(made.path), rows_of(folder / "new"))


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.7, 1.0])
def test_the_hit_rate_is_that_of_drawn_lookups(exponent, share):
    rows, hot = 5_000, int(5_000 * share)
    ranks = zipf_ranks(np.random.default_rng(3).random(200_000), rows=rows, exponent=exponent)
    assert zipf_share(hot, rows, exponent) == pytest.approx((ranks < hot).mean(), abs=0.004)


def test_a_histogram_gives_its_own_hit_rate(folder):
    popularity = Popularity(str(folder / "counts.npy"))
    assert popularity.hit_rate(1, 40) == 390 / COUNTS.sum()
    assert popularity.hit_rate(40, 40) == 1.0
    assert popularity.hit_rate(0, 40) == 0.0


@pytest.mark.parametrize("text", ["zipf", "zipf:x", "zipf:-1", "zipf:nan", "gauss"])
def test_unknown_popularities_are_refused(text):
    with pytest.raises(ConfigError, match=text):
        Popularity(text)


def plan(capsys, *arguments):
    capsys.readouterr()
    assert run("plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_terabyte_table(capsys):
    """DLRMv3's item table on an H100 with 80 GB: figures worked out by hand."""
    sizes = ["--table", "item_id=1e9x512", "--table", "kinds=128x512", "--host-memory", 1100]
    found = plan(capsys, *sizes, "--gpu-share", "0.75", "--popularity", "uniform", "--popularity", "zipf:1.05")
    kinds, item, _, item8 = found["placements"]
    assert (kinds["tier"], kinds["hit_rates"]["uniform"], kinds["link_bytes_per_s"]["uniform"]) == ("gpu", 1.0, 0.0)
    assert (item["tier"], item["bytes"]) == ("hot set", 1_024_000_000_000)
    assert item["hit_rates"]["uniform"] == pytest.approx(60e9 / 1024 / 1e9, rel=1e-3)
    assert item["hit_rates"]["zipf:1.05"] > 0.85
    assert item["link_bytes_per_s"]["uniform"] == pytest.approx(9048 * 1024 * 1450 * (1 - 0.0586), rel=1e-3)
    assert item["request_us"]["uniform"] == pytest.approx(9048 * 1024 / 55e3 * 0.9414, rel=0.06)
    assert item["pin_seconds"] == pytest.approx(1024e9 / 0.25e9)
    assert (item8["bytes"], item8["tier"]) == (516_000_000_000, "hot set")
    assert item8["hit_rates"]["uniform"] == pytest.approx((60e9 - 4e9) / 512 / 1e9, rel=1e-3)
    assert any("0.25 GB/s" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("more", "tier"),
    [
        (["--gpu-memory", "1000"], "gpu"),
        (["--gpu-memory", "80"], "hot set"),
        (["--gpu-memory", "0.0000001"], "host"),
        (["--host-memory", "1"], "disk"),
    ],
)
def test_tiers(capsys, more, tier):
    found = plan(capsys, "--table=t=1e9x64", "--dtype=float16", *more)
    assert [row["tier"] for row in found["placements"]] == [tier]


def test_tables_share_the_memory(capsys):
    sizes = ["--table=a=1e6x512", "--table=b=1.1e6x512"]
    found = plan(capsys, *sizes, "--dtype=float16", "--gpu-memory=2", "--gpu-share=0.9")
    assert [(row["table"], row["tier"]) for row in found["placements"]] == [("a", "gpu"), ("b", "hot set")]


def test_a_folder_is_planned_as_stored_and_in_int8(folder, capsys):
    found = plan(capsys, folder / "v1")
    assert [(row["table"], row["dtype"], row["bytes"]) for row in found["placements"]] == [
        ("kinds", "as stored", 80), ("items", "as stored", 1280), ("kinds", "int8", 60), ("items", "int8", 480),
    ]  # fmt: skip
    assert run("plan", folder / "v1") == 0
    assert "Assumed, not measured:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a tables folder"),
        (["--table", "a=5"], "expected ROWSxDIM"),
        (["--table", "a=0x5"], "rows and dim must be >= 1"),
        (["--table", "a=1e400x5"], "expected ROWSxDIM"),
        (["--table", "a=5x5", "--gpu-share", "0"], "--gpu-share must be > 0"),
        (["--table", "a=5x5", "--link", "-1"], "must be > 0"),
    ],
)
def test_wrong_plans_are_refused(capsys, arguments, message):
    assert run("plan", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "dim", "measured"), [("float16", 512, 1340.2), ("int8", 512, 698.9), ("float16", 64, 218.8)]
)
def test_bytes_in_a_cluster_are_those_of_redis(dtype, dim, measured):
    """measured: used_memory of Redis 7.0.15 after a push of 200,000 rows, per row."""
    table = TableSize(name="t", rows=200_000, dim=dim, dtype=dtype)
    assert cluster_bytes(table) / table.rows == pytest.approx(measured, rel=0.01)


def test_all_gpus_side_by_side(capsys):
    sizes = ["--table=item_id=1e9x512", "--table=user_id=1e7x512", "--gpu=all", "--dtype=int8", "--host-memory=600"]
    found = plan(capsys, *sizes)
    assert {placement["gpu"] for placement in found["placements"]} == set(GPUS)
    by_gpu = {p["gpu"]: p for p in found["placements"] if p["table"] == "item_id"}
    assert by_gpu["h200"]["hit_rates"]["uniform"] > by_gpu["h100"]["hit_rates"]["uniform"] > 0
    assert by_gpu["l4"]["cluster_bytes"] == pytest.approx(0.7e12, rel=0.01)
    assert run("plan", *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("l4 ", "h100 ")) for line in lines) == 4
