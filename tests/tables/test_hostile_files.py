"""Manifests and shard headers from strangers: an ArtefactError or a correct read, never a crash."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import QuantisedRows, write_vector
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import (
    read_shard_header,
    read_tables,
    write_shard,
    write_table,
    write_tables_manifest,
)
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.sources import open_matrix

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "..", "../up", "/etc/passwd", "float16", "F32", "rows", "a\0b", "x" * 300, "1"]),
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))


@pytest.fixture
def folder(tmp_path):
    config = TableConfig(name="items", rows=7, dim=3, dtype="float32", features=("item",))
    stored = write_table(tmp_path, config, [np.arange(21, dtype=np.float32).reshape(7, 3)], shard_bytes=48)
    write_tables_manifest(tmp_path, [stored], "test", {})
    return tmp_path


def paths_into(document, at=()):
    """Every place in a JSON document."""
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths_into(value, (*at, key))


def replaced(document, path, value):
    if not path:
        return value
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def reads_right_or_refuses(folder):
    try:
        tables = HostTables.open(folder, verify=True)
    except ArtefactError:
        return
    for name, table in tables.tables.items():
        rows = tables.lookup(name, np.arange(table.rows))
        np.testing.assert_array_equal(rows, np.arange(21).reshape(7, 3)[: table.rows])


@FEW
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest(folder, data):
    original = (folder / "manifest.json").read_text()
    document = json.loads(original)
    path = data.draw(st.sampled_from(list(paths_into(document))))
    (folder / "manifest.json").write_text(json.dumps(replaced(document, path, data.draw(JSON))))
    reads_right_or_refuses(folder)
    (folder / "manifest.json").write_text(original)


@FEW
@given(data=st.data())
def test_any_value_anywhere_in_a_shard_header(folder, data):
    header = {"rows": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    path = data.draw(st.sampled_from(list(paths_into(header))))
    text = json.dumps(replaced(header, path, data.draw(JSON))).encode()
    shard = folder / "strange.safetensors"
    shard.write_bytes(struct.pack("<Q", 4088) + text.ljust(4088)[:4088] + bytes(48))
    with contextlib.suppress(ArtefactError):
        assert read_shard_header(shard) == ("float32", 4, 3, 4096)
    with contextlib.suppress(HstuTrtError):
        source = open_matrix(shard)
        assert source.rows * source.dim * np.dtype(source.dtype).itemsize <= 48


@FEW
@given(damage=st.binary(max_size=200), at=st.integers(0, 4200))
def test_any_bytes_over_a_shard(folder, damage, at):
    shard = folder / "items" / "00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:at] + damage)
    reads_right_or_refuses(folder)
    shard.write_bytes(whole)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 1 << 20) + b"[" * (1 << 20),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
    ],
    ids=["empty", "one byte", "huge header", "deep nesting", "a list", "no text"],
)
def test_files_that_are_no_shards(tmp_path, content):
    shard = tmp_path / "strange.safetensors"
    shard.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"strange.safetensors is not a"):
        read_shard_header(shard)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "items/../../outside"])
def test_a_manifest_cannot_name_files_outside(folder, name):
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="outside its folder"):
        read_tables(folder, regenerate="x")


def test_a_payload_off_the_alignment_is_refused(tmp_path):
    header = json.dumps({"rows": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    shard = tmp_path / "s.safetensors"
    shard.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ArtefactError, match="not at a multiple of 4096"):
        read_shard_header(shard)


@pytest.mark.parametrize(
    ("rows", "dim"), [(0, 1), (1, 1), (3, 2048), (2**40, 2**20)], ids=["empty", "small", "wide", "longest header"]
)
def test_the_header_always_fits_its_page(tmp_path, rows, dim):
    shard = tmp_path / "s.safetensors"
    if rows < 100:
        assert write_shard(shard, "float16", dim, [np.zeros((rows, dim), np.float16)]) == rows
        assert read_shard_header(shard) == ("float16", rows, dim, 4096)
    else:
        text = json.dumps({"rows": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, rows * dim * 2]}})
        assert len(text) < 4088


def test_a_feature_in_two_tables_is_refused(tmp_path):
    stored = [
        write_table(tmp_path, TableConfig(name=n, rows=1, dim=1, dtype="float32", features=("f",)), [np.ones((1, 1))])
        for n in ("a", "b")
    ]
    write_tables_manifest(tmp_path, stored, "test", {})
    with pytest.raises(ArtefactError, match="feature 'f' looks up in two tables, 'a' and 'b'"):
        read_tables(tmp_path, regenerate="x")


@pytest.fixture
def quantised(tmp_path):
    """An int8 table in two shards, permuted; scales of one half, so that every value is exact."""
    rule = IdRule(hash="permutation", row_of_id="items/row_of_id.safetensors", default_row=3)
    write_vector(tmp_path / "items/row_of_id.safetensors", "row_of_id", np.arange(7, dtype=np.uint32))
    rows = QuantisedRows(np.arange(21, dtype=np.int8).reshape(7, 3) * 2, np.full(7, 0.5, np.float32))
    config = TableConfig(name="items", rows=7, dim=3, dtype="float32", features=("item",))
    stored = write_table(tmp_path, config, [rows], shard_bytes=12, dtype="int8", ids=rule, row_order="rank")
    write_tables_manifest(tmp_path, [stored], "test", {"version": "v1", "pair_id": "p"})
    return tmp_path


@FEW
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest_of_quantised_tables(quantised, data):
    original = (quantised / "manifest.json").read_text()
    document = json.loads(original)
    path = data.draw(st.sampled_from(list(paths_into(document))))
    (quantised / "manifest.json").write_text(json.dumps(replaced(document, path, data.draw(JSON))))
    reads_right_or_refuses(quantised)
    (quantised / "manifest.json").write_text(original)


def mutated(content, rng):
    """A copy with a few bytes changed, cut, doubled or moved."""
    content, kind = bytearray(content), rng.integers(4)
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 9))
    if kind == 0:
        content[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
    elif kind == 1:
        del content[at : at + length]
    elif kind == 2:
        content[at:at] = content[at : at + length]
    else:
        content[at] ^= 1 << int(rng.integers(8))
    return bytes(content)


@pytest.mark.parametrize(
    "file", ["manifest.json", "items/00000.safetensors", "items/00001.safetensors", "items/row_of_id.safetensors"]
)
def test_mutated_bytes_of_quantised_tables(quantised, file):
    rng, original = np.random.default_rng(len(file)), (quantised / file).read_bytes()
    for _ in range(150):
        (quantised / file).write_bytes(mutated(original, rng))
        reads_right_or_refuses(quantised)
        # Without hashing, other values may come back, but nothing else may happen.
        with contextlib.suppress(ArtefactError):
            tables = HostTables.open(quantised)
            for name, table in tables.tables.items():
                with np.errstate(invalid="ignore", over="ignore"):
                    tables.lookup(name, np.arange(table.rows), policy="zero")


def test_mutated_bytes_of_a_checkpoint(tmp_path, golden):
    for name in ("sparse/.metadata", "sparse/__0_0.distcp", "non_sparse.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((golden / "ckptA/0" / name).read_bytes())
    size = open_matrix(tmp_path, "item_id").rows
    for name in ("sparse/.metadata", "sparse/__0_0.distcp", "non_sparse.ckpt"):
        rng, original = np.random.default_rng(len(name)), (tmp_path / name).read_bytes()
        for _ in range(100):
            (tmp_path / name).write_bytes(mutated(original, rng))
            with contextlib.suppress(HstuTrtError):
                source = open_matrix(tmp_path, "item_id")
                assert source.rows <= size * 40
                for _ in source.blocks("float32"):
                    pass
        (tmp_path / name).write_bytes(original)
