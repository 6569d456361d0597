"""Shards of every dtype: scales stand apart and aligned, other readers understand them, damage is told."""

import json
import struct

import numpy as np
import pytest
from safetensors import safe_open

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import (
    PAYLOAD_ALIGNMENT,
    QuantisedRows,
    ShardWriter,
    map_vector,
    read_shard_header,
    shard_layout,
    write_shard,
    write_vector,
)
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest

REGENERATE = "hstu-trt tables quantise"
QUANTISED = [("int8", np.int8, "int8_sym_row"), ("float8_e4m3fn", np.uint8, "e4m3_row")]


def quantised(rows, dim, dtype=np.int8):
    values = (np.arange(rows * dim) % 251).astype(np.uint8).view(dtype).reshape(rows, dim)
    return QuantisedRows(values, np.arange(rows, dtype=np.float32) / 8)


def write_quantised(folder, rows=7, dim=3, dtype="int8", storage=np.int8, **options):
    config = TableConfig(name="item", rows=rows, dim=dim, dtype="float16", features=("item_id",))
    blocks = [quantised(rows, dim, storage)[:2], quantised(rows, dim, storage)[2:]]
    table = write_table(folder, config, blocks, dtype=dtype, **options)
    return table


@pytest.mark.parametrize(("dtype", "storage", "quantiser"), QUANTISED)
@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
def test_quantised_tables_are_read_back(tmp_path, dtype, storage, quantiser, rows_per_shard):
    table = write_quantised(tmp_path, dtype=dtype, storage=storage, shard_bytes=3 * rows_per_shard)
    write_tables_manifest(tmp_path, [table], REGENERATE, {"version": "v7", "pair_id": "abc"})
    found = read_tables_folder(tmp_path, regenerate=REGENERATE, verify=True)
    assert found.tables == {"item": table}
    assert (found.version, found.pair_id) == ("v7", "abc")
    assert len(table.shards) == -(-7 // rows_per_shard)
    assert (table.row_bytes, table.payload_bytes) == (3, 7 * 7)
    entry = json.loads((tmp_path / "manifest.json").read_text())["tables"]["item"]
    assert (entry["dtype"], entry["quantiser"]) == (dtype, quantiser)
    expected = quantised(7, 3, storage)
    for shard in table.shards:
        rows = slice(shard.first_row, shard.first_row + shard.rows)
        raw = (tmp_path / shard.file).read_bytes()
        at = table.scale_offset(shard)
        assert at % PAYLOAD_ALIGNMENT == 0
        assert raw[shard.payload_offset :][: shard.rows * 3] == expected.values[rows].tobytes()
        assert raw[at:] == expected.scale[rows].tobytes()


@pytest.mark.parametrize(("rows", "dim"), [(0, 4), (1, 1), (5, 3), (8, 512), (9, 512)])
@pytest.mark.parametrize(("dtype", "storage", "_"), QUANTISED)
def test_the_safetensors_library_reads_them(tmp_path, dtype, storage, _, rows, dim):
    path = tmp_path / "a.safetensors"
    assert write_shard(path, dtype, dim, [quantised(rows, dim, storage)]) == rows
    assert read_shard_header(path) == (dtype, rows, dim, PAYLOAD_ALIGNMENT)
    with safe_open(path, framework="np") as shard:
        names = set(shard.keys())
        assert {"rows", "scale"} <= names <= {"rows", "scale", "pad.scale"}
        assert shard.get_slice("rows").get_dtype() == ("I8" if dtype == "int8" else "F8_E4M3")
        assert np.array_equal(shard.get_tensor("scale"), quantised(rows, dim).scale)


def test_e4m3_bits_are_those_of_torch(tmp_path):
    import torch
    from safetensors.torch import load_file

    values = torch.tensor([[1.0, -0.5, 448.0, 2.0**-9]]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    rows = QuantisedRows(values, np.ones(1, np.float32))
    write_shard(tmp_path / "a.safetensors", "float8_e4m3fn", 4, [rows])
    assert load_file(tmp_path / "a.safetensors")["rows"].float().tolist() == [[1.0, -0.5, 448.0, 2.0**-9]]


def test_further_columns_stand_behind_the_scales(tmp_path):
    path = tmp_path / "a.safetensors"
    with ShardWriter(path, "int8", 2) as shard:
        shard.add(quantised(3, 2))
        shard.add_column("row_number", np.asarray([4, 8, 2**40]))
    assert read_shard_header(path, {"row_number": "I64"})[1] == 3
    with pytest.raises(ArtefactError, match=r"unexpected tensor 'pad\.row_number'"):
        read_shard_header(path)
    at = shard_layout("int8", 2, 3, {"row_number": "I64"})["row_number"]["data_offsets"][0]
    assert np.fromfile(path, np.int64, offset=PAYLOAD_ALIGNMENT + at).tolist() == [4, 8, 2**40]


def test_rows_with_and_without_scales_do_not_mix(tmp_path):
    with pytest.raises(ArtefactError, match="int8 rows have a scale"):
        write_shard(tmp_path / "a.safetensors", "int8", 2, [np.zeros((1, 2), np.int8)])
    with pytest.raises(ArtefactError, match="float16 rows have no scale"):
        write_shard(tmp_path / "a.safetensors", "float16", 2, [quantised(1, 2)])


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_a_vector_is_mapped(tmp_path, count):
    values = np.arange(count, dtype=np.uint32)
    write_vector(tmp_path / "v.safetensors", "row_of_id", values)
    assert np.array_equal(map_vector(tmp_path / "v.safetensors", "row_of_id", "uint32"), values)
    with pytest.raises(ArtefactError, match="expected one tensor 'rank'"):
        map_vector(tmp_path / "v.safetensors", "rank", "uint32")


def rewrite_header(path, change):
    raw = path.read_bytes()
    document = json.loads(raw[8:4096])
    change(document)
    path.write_bytes(struct.pack("<Q", 4088) + json.dumps(document).encode().ljust(4088) + raw[4096:])


DAMAGE = {
    "no scale": (lambda d: d.pop("scale"), "is not a table shard .*scale"),
    "scale elsewhere": (lambda d: d["scale"].update(data_offsets=[4100, 4128]), "is damaged"),
    "scale of another type": (lambda d: d["scale"].update(dtype="F16"), "is damaged"),
    "a stranger": (lambda d: d.update(more=d["scale"]), "unexpected tensor 'more'"),
    "another row count": (lambda d: d["rows"].update(shape=[8, 3]), "is damaged"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_quantised_shard_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    write_shard(path, "int8", 3, [quantised(7, 3)])
    rewrite_header(path, change)
    with pytest.raises(ArtefactError, match=message):
        read_shard_header(path)


@pytest.fixture
def hashed(tmp_path):
    write_vector(tmp_path / "item/row_of_id.safetensors", "row_of_id", np.arange(7, dtype=np.uint32))
    ids = IdRule(hash="permutation", row_of_id="item/row_of_id.safetensors", default_row=6)
    table = write_quantised(tmp_path, ids=ids, row_order="rank")
    write_tables_manifest(tmp_path, [table], REGENERATE, {})
    return tmp_path, table


def test_id_rules_are_read_back(hashed):
    folder, table = hashed
    assert read_tables_folder(folder, regenerate=REGENERATE).tables == {"item": table}
    mixed = write_quantised(folder, ids=IdRule(hash="splitmix64", seed=2**64 - 1))
    write_tables_manifest(folder, [mixed], REGENERATE, {})
    assert read_tables_folder(folder, regenerate=REGENERATE).tables == {"item": mixed}


EDITS = {
    "unknown key": (lambda t: t.update(salt=1), "unknown key 'salt'"),
    "quantiser": (lambda t: t.update(quantiser="int4"), "quantiser 'int4', 'int8_sym_row' for int8"),
    "no quantiser": (lambda t: t.pop("quantiser"), "quantiser None"),
    "dtype": (lambda t: t.update(dtype="int4"), "dtype must be one of float32, float16, int8, float8_e4m3fn"),
    "row order": (lambda t: t.update(row_order="best"), "row_order must be identity or rank, got 'best'"),
    "default row": (lambda t: t.update(default_row=7), "default_row is 7, it has 7 rows"),
    "default row as text": (lambda t: t.update(default_row="6"), "default_row must be an integer"),
    "hash": (lambda t: t.update(hash={"kind": "md5"}), "unknown hash 'md5'"),
    "hash key": (lambda t: t["hash"].update(salt=1), "unknown key 'salt' of its hash"),
    "no file": (lambda t: t["hash"].pop("file"), "a permutation needs one"),
    "foreign file": (lambda t: t["hash"].update(file="/etc/hostname"), "not among the manifest's files"),
    "seed": (lambda t: t.update(hash={"kind": "splitmix64", "seed": -1}), "seed -1"),
    "large seed": (lambda t: t.update(hash={"kind": "splitmix64", "seed": 2**64}), "of 64 bits"),
    "seed without hash": (lambda t: t.update(hash={"kind": "none", "seed": 1}), "other hashes take none"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_wrong_schema_is_refused(hashed, change, message):
    folder, _ = hashed
    document = json.loads((folder / "manifest.json").read_text())
    change(document["tables"]["item"])
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=message):
        read_tables_folder(folder, regenerate=REGENERATE)


@pytest.mark.parametrize(("key", "value"), [("version", 3), ("pair_id", ["x"])])
def test_facts_of_another_type_are_refused(hashed, key, value):
    folder, table = hashed
    write_tables_manifest(folder, [table], REGENERATE, {key: value})
    with pytest.raises(ArtefactError, match=f"{key} must be a text"):
        read_tables_folder(folder, regenerate=REGENERATE)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    table = write_quantised(tmp_path / "tables")
    shard = tmp_path / "tables" / table.shards[0].file
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    write_tables_manifest(tmp_path / "tables", [table], REGENERATE, {})
    with pytest.raises(ArtefactError, match="a link that leads outside"):
        read_tables_folder(tmp_path / "tables", regenerate=REGENERATE)


@pytest.mark.parametrize("rule", [{"seed": 1}, {"row_of_id": "x"}, {"hash": "permutation"}, {"hash": "md5"}])
def test_an_id_rule_that_means_nothing_is_refused(rule):
    with pytest.raises(ConfigError):
        IdRule(**rule)
