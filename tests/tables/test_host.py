"""Host lookups: exact rows from one and several shards, id policies, padding, dtypes."""

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.tables.host import HostTables

ROWS = {"items": (23, 6, "float32"), "kinds": (5, 6, "float16"), "empty": (0, 6, "float32")}
FEATURES = {"items": ("item", "candidate"), "kinds": ("kind",), "empty": ("nothing",)}


def values(name):
    rows, dim, dtype = ROWS[name]
    return np.random.default_rng(len(name)).normal(size=(rows, dim)).astype(dtype)


def write_folder(folder, shard_rows):
    stored = []
    for name, (rows, dim, dtype) in ROWS.items():
        config = TableConfig(name=name, rows=rows, dim=dim, dtype=dtype, features=FEATURES[name])
        shard_bytes = shard_rows * dim * np.dtype(dtype).itemsize
        stored.append(write_table(folder, config, [values(name)[:2], values(name)[2:]], shard_bytes))
    write_tables_manifest(folder, stored, "test", {})
    return folder


@pytest.fixture(params=[1, 4, 100], ids="{} rows per shard".format)
def folder(request, tmp_path):
    return write_folder(tmp_path / "tables", request.param)


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def tables(request, folder, native_library):
    return HostTables.open(folder, verify=True, native=request.param, resident=request.param)


@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("table", ["items", "kinds"])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_rows_are_exact(tables, id_dtype, dtype, table, count):
    ids = np.random.default_rng(count).integers(0, ROWS[table][0], count).astype(id_dtype)
    rows = tables.lookup(table, ids, dtype=dtype)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, values(table)[ids].astype(dtype))


def test_every_row_lies_in_its_place(tables):
    np.testing.assert_array_equal(tables.lookup("items", np.arange(23)), values("items"))


BAD = np.asarray([3, 23, -1, -9, 22, 2**40, -(2**62)])


def test_zero_policy(tables):
    rows = tables.lookup("items", BAD, policy="zero")
    expected = np.zeros((7, 6), np.float32)
    expected[[0, 4]] = values("items")[[3, 22]]
    np.testing.assert_array_equal(rows, expected)


def test_clamp_policy(tables):
    rows = tables.lookup("items", BAD, policy="clamp")
    np.testing.assert_array_equal(rows, values("items")[[3, 22, 0, 0, 22, 22, 0]])


@pytest.mark.parametrize("policy", ["reject", "clamp", "zero"])
@pytest.mark.parametrize("padding_id", [-1, 0, 99])
def test_padding_is_a_zero_row_under_every_policy(tables, policy, padding_id):
    rows = tables.lookup("items", np.asarray([4, padding_id, 7]), policy=policy, padding_id=padding_id)
    np.testing.assert_array_equal(rows[1], np.zeros(6))
    np.testing.assert_array_equal(rows[[0, 2]], values("items")[[4, 7]])


@pytest.mark.parametrize("bad", [23, -1, 2**31, -(2**40)])
def test_reject_names_position_and_value(tables, bad):
    with pytest.raises(InputError, match=rf"'uih_ids' holds {bad} at \[2\]; table 'items' has 23 rows.* 0 to 22"):
        tables.lookup("items", np.asarray([0, 22, bad, bad]), what="uih_ids")


def test_features_stand_side_by_side(tables):
    ids = np.asarray([[1, 4, 22], [0, 0, 0]])
    rows = tables.lookup_features(["item", "kind", "candidate"], ids)
    expected = np.concatenate([values("items")[[1, 0]], values("kinds")[[4, 0]], values("items")[[22, 0]]], axis=1)
    np.testing.assert_array_equal(rows, expected.astype(np.float32))


def test_features_take_empty_ids(tables):
    assert tables.lookup_features(["item", "kind"], np.zeros((0, 2), np.int64)).shape == (0, 12)


def test_reject_names_the_feature(tables):
    ids = np.asarray([[1, 4], [2, 5]])
    with pytest.raises(InputError, match=r"'uih_ids' \(feature 'kind'\) holds 5 at \[1, 1\]; table 'kinds' has 5 rows"):
        tables.lookup_features(["item", "kind"], ids, what="uih_ids")


def test_a_table_without_rows_answers_only_zeros(tables):
    ids = np.asarray([0, 1])
    np.testing.assert_array_equal(tables.lookup("empty", ids, policy="zero"), np.zeros((2, 6)))
    assert tables.lookup("empty", ids[:0]).shape == (0, 6)
    for policy in ("reject", "clamp"):
        with pytest.raises(InputError, match="'empty' has no rows"):
            tables.lookup("empty", ids, policy=policy)


def test_rounding_is_numpy_s(tables):
    odd = tables.lookup("items", np.arange(23), dtype="float16")
    np.testing.assert_array_equal(odd, values("items").astype(np.float16))
    assert (odd.astype(np.float32) != values("items")).any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.asarray([1.0]), "must be int64 or int32, got float64"),
        (np.asarray([1], np.uint64), "got uint64"),
        (np.asarray([[1]]), r"must have 1 dimensions, got shape \[1, 1\]"),
        (np.asarray(1), r"got shape \[\]"),
    ],
)
def test_wrong_ids_are_refused(tables, ids, message):
    with pytest.raises(InputError, match=message):
        tables.lookup("items", ids)


def test_wrong_options_are_refused(tables):
    ids = np.asarray([1])
    with pytest.raises(ConfigError, match="no table 'item'; tables: items, kinds, empty"):
        tables.lookup("item", ids)
    with pytest.raises(ConfigError, match="no table for feature 'items'"):
        tables.lookup_features(["items"], ids[:, None])
    with pytest.raises(InputError, match=r"must have 2 columns \(item, kind\)"):
        tables.lookup_features(["item", "kind"], ids[:, None])
    with pytest.raises(ConfigError, match="unknown id policy 'wrap'"):
        tables.lookup("items", ids, policy="wrap")
    with pytest.raises(ConfigError, match="not 'bfloat16'"):
        tables.lookup("items", ids, dtype="bfloat16")


def test_verify_finds_a_flipped_bit(tmp_path):
    folder = write_folder(tmp_path / "tables", 4)
    shard = folder / "items" / "00002.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    HostTables.open(folder)
    with pytest.raises(ArtefactError, match=r"items/00002.safetensors does not match the sha256"):
        HostTables.open(folder, verify=True)
