"""The table format: rows survive every cut into shards, and damage is told."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import (
    PAYLOAD_ALIGNMENT,
    read_shard_header,
    read_tables,
    write_shard,
    write_table,
    write_tables_manifest,
)

DIM = 3
REGENERATE = "hstu-trt tables convert"


def table_config(rows, dtype="float32"):
    return TableConfig(name="item", rows=rows, dim=DIM, dtype=dtype, features=("item_id",))


def rows_of(count, dtype="float32"):
    return np.arange(count * DIM, dtype=dtype).reshape(count, DIM)


def split(array, cuts):
    return np.split(array, sorted(cuts))


def stored_rows(folder, table):
    parts = [
        np.fromfile(folder / shard.file, dtype=table.dtype, offset=shard.payload_offset).reshape(-1, table.dim)
        for shard in table.shards
    ]
    return np.concatenate(parts) if parts else np.zeros((0, table.dim), table.dtype)


@given(rows=st.integers(1, 40), per_shard=st.integers(1, 41), data=st.data())
def test_rows_survive_every_cut(tmp_path_factory, rows, per_shard, data):
    folder = tmp_path_factory.mktemp("table")
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=6))
    table = write_table(folder, table_config(rows), split(rows_of(rows), cuts), shard_bytes=per_shard * DIM * 4)
    assert np.array_equal(stored_rows(folder, table), rows_of(rows))
    assert [shard.rows for shard in table.shards[:-1]] == [per_shard] * (len(table.shards) - 1)
    assert [shard.first_row for shard in table.shards] == list(range(0, rows, per_shard))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_folder_is_read_back(tmp_path, dtype):
    table = write_table(tmp_path, table_config(7, dtype), [rows_of(7)], shard_bytes=1)
    write_tables_manifest(tmp_path, [table], REGENERATE, {"note": "planted"})
    found = read_tables(tmp_path, regenerate=REGENERATE, verify=True)
    assert found == {"item": table}
    assert len(table.shards) == 7
    assert table.row_bytes == DIM * np.dtype(dtype).itemsize
    assert np.array_equal(stored_rows(tmp_path, table), rows_of(7, dtype))


def test_the_payload_is_aligned_and_plain_safetensors(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "a.safetensors"
    assert write_shard(path, "float16", DIM, [rows_of(2), rows_of(0), rows_of(1)]) == 3
    assert read_shard_header(path) == ("float16", 3, DIM, PAYLOAD_ALIGNMENT)
    assert load_file(path)["rows"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize(("given_rows", "announced"), [(3, 4), (4, 3), (0, 1)])
def test_the_row_count_is_kept(tmp_path, given_rows, announced):
    with pytest.raises(ArtefactError, match=f"table item: {given_rows} rows were given, {announced} announced"):
        write_table(tmp_path, table_config(announced), [rows_of(given_rows)])


@pytest.mark.parametrize("block", [np.zeros((2, DIM + 1)), np.zeros(DIM)])
def test_a_block_of_another_width_is_refused(tmp_path, block):
    with pytest.raises(ArtefactError, match="the table's width is 3"):
        write_shard(tmp_path / "a.safetensors", "float32", DIM, [block])


def shard(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}

DAMAGED = {
    "empty": (b"", "is not a safetensors file"),
    "no header": (struct.pack("<Q", 10), "is not a safetensors file"),
    "huge header": (struct.pack("<Q", 1 << 40), "is not a safetensors file .*header of"),
    "no JSON": (shard(b"{{{"), "is not a safetensors file"),
    "a list": (shard([]), "is not a safetensors file"),
    "another tensor": (shard({"weight": ENTRY}), "is not a table shard .*rows"),
    "another dtype": (shard({"rows": {**ENTRY, "dtype": "I64"}}), "is not a table shard .*I64"),
    "one axis": (shard({"rows": {**ENTRY, "shape": [2]}}, b"\0" * 8), "is not a table shard"),
    "not aligned": (shard({"rows": ENTRY}, b"\0" * 8), "not at a multiple of 4096"),
    "negative rows": (shard({"rows": {**ENTRY, "shape": [-1, 2]}}), "rows must be an integer >= 0, got -1"),
    "rows as text": (shard({"rows": {**ENTRY, "shape": ["1", 2]}}), "rows must be an integer"),
    "no width": (shard({"rows": {**ENTRY, "shape": [1, 0], "data_offsets": [0, 0]}}), "dim must be an integer >= 1"),
    "cut short": (shard({"rows": ENTRY}, b"\0" * 7), "is damaged"),
    "too long": (shard({"rows": ENTRY}, b"\0" * 9), "is damaged"),
    "wrong offsets": (shard({"rows": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12), "is damaged"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read_shard_header(path)


@pytest.fixture
def folder(tmp_path):
    table = write_table(tmp_path, table_config(4), [rows_of(4)], shard_bytes=2 * DIM * 4)
    write_tables_manifest(tmp_path, [table], REGENERATE, {})
    return tmp_path


def edit_tables(folder, change):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document["tables"])
    path.write_text(json.dumps(document))


EDITS = {
    "a field is gone": (lambda t: t["item"].pop("dim"), "the manifest's tables are malformed"),
    "not a table": (lambda t: t.update(item=3), "the manifest's tables are malformed"),
    "rows": (lambda t: t["item"].update(rows=9), "table item has 4 rows, the manifest says 9"),
    "width": (lambda t: t["item"].update(dim=5), "holds 2 x 3 float32 rows, the manifest says 2 x 5 float32"),
    "dtype": (lambda t: t["item"].update(dtype="float16"), "the manifest says 2 x 3 float16"),
    "order": (lambda t: t["item"]["shards"].reverse(), "the manifest says .* from row 2"),
    "a foreign shard": (lambda t: t["item"]["shards"][0].__setitem__(0, "x"), "shard x is not among the manifest's"),
    "a shard less": (lambda t: t["item"]["shards"].pop(), "table item has 2 rows, the manifest says 4"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_disagrees_with_its_shards_is_refused(folder, change, message):
    edit_tables(folder, change)
    with pytest.raises(ArtefactError, match=message):
        read_tables(folder, regenerate=REGENERATE)


def test_flipped_rows_are_found_when_verifying(folder):
    path = folder / "item/00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_tables(folder, regenerate=REGENERATE)
    with pytest.raises(ArtefactError, match=f"does not match the sha256 .*{REGENERATE}"):
        read_tables(folder, regenerate=REGENERATE, verify=True)
