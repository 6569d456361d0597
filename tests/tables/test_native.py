"""The C++ lookups against numpy's, bit by bit, in every type, policy, hash and shape; and under threads and forks."""

import itertools
import os
import threading

import numpy as np
import pytest
from id_rules import IDS, PERMUTATION, RULES, VECTORS

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.shards import QuantisedRows, storage_dtype
from hstu_trt.contract.stored_table import IdRule, Shard, StoredTable
from hstu_trt.tables.gather import NumpyGather
from hstu_trt.tables.ids import POLICIES
from hstu_trt.tables.native import NativeGather, NativeLibrary, load_library
from hstu_trt.tables.quantisers import quantise_rows
from hstu_trt.tables.table_arrays import TableArrays, map_file

DTYPES = ("float32", "float16", "int8", "float8_e4m3fn")


def arrays_of(rows, dtype, rule=None, row_of_id=None, cuts=()):
    """A table in memory: float rows [n, dim], or QuantisedRows as they are."""
    if isinstance(rows, QuantisedRows):
        block = rows
    elif dtype in ("int8", "float8_e4m3fn"):
        block = quantise_rows(rows, dtype)
    else:
        block = QuantisedRows(rows.astype(dtype), np.zeros(len(rows), np.float32))
    bounds = [0, *cuts, len(block)]
    parts = [block[slice(low, high)] for low, high in itertools.pairwise(bounds) if low < high]
    shards = tuple(Shard("x", low, high - low, 4096) for low, high in itertools.pairwise(bounds))
    table = StoredTable("t", len(block), block.values.shape[1], dtype, ("t",), shards, rule or IdRule())
    scales = tuple(part.scale for part in parts) if dtype in ("int8", "float8_e4m3fn") else ()
    firsts = np.cumsum([0, *(len(part) for part in parts)])[:-1].astype(np.int64)
    return TableArrays(table, tuple(part.values for part in parts), scales, firsts, row_of_id)


def both(arrays, ids, dtype, policy="zero", padding_id=None, **options):
    """(out, status, outcome) of numpy and of the library, from memory that held something else before."""
    found = []
    for gather in (NumpyGather(arrays), NativeGather(arrays, load_library(), **options)):
        out = np.full((len(ids), arrays.table.dim), 77, dtype)
        status = np.full(len(ids), 99, np.uint8)
        found.append((out, status, gather.lookup(ids, out, status, policy, padding_id)))
    return found


def assert_same(arrays, ids, dtype, policy="zero", padding_id=None, **options):
    (out, status, outcome), (native, native_status, native_outcome) = both(
        arrays, ids, dtype, policy, padding_id, **options
    )
    assert outcome == native_outcome
    if outcome.rejected is None:
        assert status.tolist() == native_status.tolist()
        bits = np.uint16 if dtype == "float16" else np.uint32
        np.testing.assert_array_equal(out.view(bits), native.view(bits))


@pytest.fixture(autouse=True)
def _built(native_library):
    pass


@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 8, 15, 16, 17, 40, 512])
def test_rows_in_every_type_and_width(dtype, out_dtype, dim, portable):
    rng = np.random.default_rng(dim)
    arrays = arrays_of(rng.normal(size=(37, dim)).astype(np.float32), dtype, cuts=(1, 20))
    assert_same(arrays, rng.integers(-2, 39, 400), out_dtype, portable=portable)


@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padding_id", [None, -1, 0])
@pytest.mark.parametrize("rows", [7, 0, 4])
def test_every_policy_and_hash(rule, policy, padding_id, rows, portable):
    rule, row_of_id = RULES[rule]
    if not rows:
        rule, row_of_id = IdRule(hash=rule.hash, seed=rule.seed, row_of_id=rule.row_of_id), PERMUTATION[:0]
    arrays = arrays_of(np.ones((rows, 3), np.float32) * 2, "float32", rule, row_of_id if rule.row_of_id else None)
    for ids in (np.asarray(IDS), np.asarray(IDS)[[0, 1, 4]], np.asarray(IDS[:0], np.int64)):
        assert_same(arrays, ids, "float32", policy, padding_id, portable=portable)


@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
def test_every_half_and_every_e4m3_code(portable):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = np.where(np.isnan(halves), np.float16(0), halves).reshape(256, 256)
    assert_same(arrays_of(halves, "float16"), np.arange(256), "float32", portable=portable)
    scales = np.asarray([0.0, 1e-30, 2.0**-14, 1 / 3, 1.0, 140.0, 1e30], np.float32)
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    for dtype, values in (("float8_e4m3fn", codes), ("int8", np.arange(-128, 128).astype(np.int8))):
        rows = QuantisedRows(np.tile(values, (len(scales), 1)), scales)
        for out_dtype in ("float32", "float16"):
            assert_same(arrays_of(rows, dtype), np.arange(len(scales)), out_dtype, portable=portable)


@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
def test_an_e4m3_nan_stays_one(portable):
    rows = QuantisedRows(np.asarray([[0x7F, 0xFF, 0x7E] * 4], np.uint8), np.ones(1, np.float32))
    (_, _, _), (native, _, _) = both(arrays_of(rows, "float8_e4m3fn"), np.asarray([0]), "float16", portable=portable)
    assert np.isnan(native[0]).tolist() == [True, True, False] * 4


@pytest.mark.parametrize("portable", [False, True], ids=["vector", "portable"])
def test_floats_round_to_halves_as_numpy_rounds(portable):
    """Around every finite half: the halfway point to the next one and its neighbours, and beyond the largest."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    half_way = (halves[:-1] + halves[1:]) / 2
    beside = [np.nextafter(half_way, np.float32(towards)) for towards in (0, 1e9)]
    further = np.asarray([65504, 65519.996, 65520, 7e4, 1e38, np.inf, 1e-8, 1e-45, 0.0], np.float32)
    values = np.concatenate([halves, half_way, *beside, further])
    rows = np.stack([values, -values])
    assert_same(arrays_of(rows, "float32"), np.asarray([0, 1]), "float16", portable=portable)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000, 9048])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_counts_and_threads(count, threads):
    rng = np.random.default_rng(count)
    arrays = arrays_of(rng.normal(size=(500, 64)).astype(np.float32), "int8", cuts=(100, 101, 499))
    assert_same(arrays, rng.integers(-1, 501, count), "float16", "clamp", threads=threads)


def test_the_first_rejected_place_is_named():
    arrays = arrays_of(np.ones((10, 64), np.float32), "float32")
    ids = np.zeros(9048, np.int64)
    ids[[9000, 4000, 4001, 700]] = 10
    for _, _, outcome in both(arrays, ids, "float32", "reject", threads=2):
        assert (outcome.bad, outcome.rejected) == (4, 700)


@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
def test_strided_ids_status_and_output(id_dtype):
    arrays = arrays_of(np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32), "float32", cuts=(4,))
    ids = np.random.default_rng(1).integers(-1, 10, (50, 3)).astype(id_dtype)
    found = []
    for gather in (NumpyGather(arrays), NativeGather(arrays, load_library())):
        out, status = np.full((50, 18), 5, np.float16), np.full((50, 3), 9, np.uint8)
        gather.lookup(ids[:, 1], out[:, 6:12], status[:, 1], "zero", None)
        gather.lookup(ids[::-1, 2], out[:, 12:], status[:, 2], "zero", None)
        found.append((out, status))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert (found[1][0][:, :6] == 5).all()


@pytest.mark.parametrize(("id_", "seed", "rows", "hashed", "row"), VECTORS)
def test_vectors(id_, seed, rows, hashed, row):
    library = load_library()
    assert f"{library.splitmix64(id_, seed):016x}" == hashed
    assert library.fastrange(int(hashed, 16), rows) == row


def test_a_permutation_that_leads_outside_cannot_read_there():
    row_of_id = np.asarray([2**32 - 1, 1, 5, 0], np.uint32)
    rule = IdRule(hash="permutation", row_of_id="x")
    arrays = arrays_of(np.arange(8, dtype=np.float32).reshape(4, 2), "float32", rule, row_of_id)
    for policy in POLICIES:
        assert_same(arrays, np.arange(-1, 6), "float32", policy)


def test_many_threads_share_a_table():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 128)).astype(np.float32)
    gather, wrong = NativeGather(arrays_of(rows, "float32", cuts=(1000,)), load_library(), threads=2), []

    def look_up(seed):
        for _ in range(30):
            ids = np.random.default_rng(seed).integers(0, 3000, 3000)
            out, status = np.empty((3000, 128), np.float32), np.empty(3000, np.uint8)
            gather.lookup(ids, out, status, "reject", None)
            if not np.array_equal(out, rows[ids]):
                wrong.append(seed)

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_looks_up():
    rows = np.random.default_rng(0).normal(size=(3000, 128)).astype(np.float32)
    arrays, ids = arrays_of(rows, "float32"), np.arange(3000)[::-1].copy()
    assert_same(arrays, ids, "float32", threads=2)
    child = os.fork()
    if child == 0:
        out, status = np.empty((3000, 128), np.float32), np.empty(3000, np.uint8)
        NativeGather(arrays, load_library(), threads=2).lookup(ids, out, status, "reject", None)
        os._exit(0 if np.array_equal(out, rows[ids]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("offset", [0, 4096, 5])
def test_files_are_read_into_memory(tmp_path, offset):
    content = np.random.default_rng(0).integers(0, 256, (17 << 20) + 7, dtype=np.uint8)
    content.tofile(tmp_path / "f")
    read = load_library().read_file(tmp_path / "f", offset, (len(content) - offset,), np.dtype(np.uint8))
    assert read.ctypes.data % (2 << 20) == 0
    part = read[100:200]
    np.testing.assert_array_equal(read, map_file(tmp_path / "f", offset, read.shape, read.dtype))
    del read
    np.testing.assert_array_equal(part, content[offset + 100 : offset + 200])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    read = load_library().read_file
    with pytest.raises(ArtefactError, match="No such file"):
        read(tmp_path / "g", 0, (1,), np.dtype(np.uint8))
    with pytest.raises(ArtefactError, match="101 bytes from 0 on cannot be read"):
        read(tmp_path / "f", 0, (101,), np.dtype(np.uint8))


@pytest.mark.parametrize("wrong", ["width", "ids", "status", "columns"])
def test_arrays_that_do_not_fit_are_refused(wrong):
    gather = NativeGather(arrays_of(np.ones((4, 6), np.float32), "float32"), load_library())
    ids, out, status = np.zeros(3, np.int64), np.empty((3, 6), np.float32), np.empty(3, np.uint8)
    if wrong == "width":
        out = np.empty((3, 5), np.float32)
    elif wrong == "ids":
        ids = np.zeros(3, np.int16)
    elif wrong == "status":
        status = np.empty(2, np.uint8)
    else:
        out = np.empty((3, 12), np.float32)[:, ::2]
    with pytest.raises(ValueError, match=r"do not fit|are not looked up|bytes apart"):
        gather.lookup(ids, out, status, "zero", None)


def test_another_library_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="make tables-lib"):
        NativeLibrary(tmp_path / "missing.so")
    (tmp_path / "empty.so").write_bytes(b"")
    with pytest.raises(ArtefactError, match="is no library of the tables room"):
        NativeLibrary(tmp_path / "empty.so")


def test_the_storage_types_are_numpy_s():
    assert [str(storage_dtype(dtype)) for dtype in DTYPES] == ["float32", "float16", "int8", "uint8"]
