"""`tables delta`: what changed, and nothing that leads elsewhere."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from table_tools import KINDS, ROWS, convert, read, rows_of, run

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.tables.delta import apply_delta, make_delta, tables_digest


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
