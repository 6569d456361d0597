"""Lookups in a real cluster: exact rows, statuses, policies, versions, and rows that are missing or malformed."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
from remote_tables import SHAPES, partition_key, push, table_values, write_folder

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.remote_push import publish, retire
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = pytest.mark.redis


@pytest.mark.parametrize("table", SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_row_is_exact(open_tables, table, dtype):
    ids = np.arange(SHAPES[table][0])
    rows, status = open_tables().lookup(table, ids, LookupOptions(dtype=dtype))
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, table_values(table).astype(dtype))
    assert (status == RowStatus.REMOTE).all()


@pytest.mark.parametrize("id_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("count", [0, 1, 2, 1000, 40_000])
def test_any_order_and_duplicates(open_tables, count, id_dtype):
    tables = open_tables()
    ids = np.random.default_rng(count).integers(0, 10_007, count).astype(id_dtype)
    rows, _ = tables.lookup("items", ids, LookupOptions(dtype="float16"))
    np.testing.assert_array_equal(rows, table_values("items")[ids])
    assert tables.counters()["rows_asked"] == len(np.unique(ids))


def test_features_stand_side_by_side_as_from_the_host(open_tables, folder):
    ids = np.random.default_rng(5).integers(0, 311, (500, 3))
    ids[7, 1] = ids[9, 2] = -1
    features, options = ["item", "user", "candidate"], {"padding_id": -1, "dtype": "float16", "policy": "clamp"}
    tables = open_tables()
    before = tables.counters()["requests"]
    rows, status = tables.lookup_features(features, ids, LookupOptions(**options))
    np.testing.assert_array_equal(rows, HostTables.open(folder).lookup_features(features, ids, **options))
    assert tables.counters()["requests"] == before + 1
    assert status.shape == (500, 3)
    assert np.argwhere(status != RowStatus.REMOTE).tolist() == [[7, 1], [9, 2]]
    assert (status[[7, 9], [1, 2]] == RowStatus.PADDING).all()


BAD = np.asarray([3, 311, -1, -9, 310, 2**40, -(2**62)])


@pytest.mark.parametrize("policy", ["zero", "clamp"])
def test_bad_ids_as_on_the_host(open_tables, folder, policy):
    tables = open_tables()
    rows, status = tables.lookup("users", BAD, LookupOptions(policy=policy, padding_id=-1))
    expected = HostTables.open(folder).lookup("users", BAD, policy=policy, padding_id=-1)
    np.testing.assert_array_equal(rows, expected)
    bad, good, padding = RowStatus.BAD_ID, RowStatus.REMOTE, RowStatus.PADDING
    assert status.tolist() == [good, bad, padding, bad, good, bad, bad]
    assert tables.counters()["bad_ids"] == 4


def test_reject_names_place_and_value_and_asks_nobody(open_tables):
    tables = open_tables()
    asked = tables.counters()["requests"]
    with pytest.raises(InputError, match=r"'uih' holds 311 at \[1\]; table 'users' has 311 rows"):
        tables.lookup("users", BAD, LookupOptions(what="uih"))
    with pytest.raises(InputError, match=r"'uih' \(feature 'user'\) holds 400 at \[1, 1\]"):
        tables.lookup_features(["item", "user"], np.asarray([[1, 1], [2, 400]]), LookupOptions(what="uih"))
    assert tables.counters()["requests"] == asked
    assert tables.counters()["bad_ids"] == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.lookup("other", BAD), ConfigError, "no remote table 'other'"),
        (lambda t: t.lookup("users", BAD.astype(float)), InputError, "int64 or int32"),
        (lambda t: t.lookup("users", BAD[None]), InputError, "1 dimensions"),
        (lambda t: t.lookup_features(["user"], np.zeros((3, 2), np.int64)), InputError, r"1 columns \(user\)"),
        (lambda t: t.lookup_features(["usr"], np.zeros((3, 1), np.int64)), ConfigError, "feature 'usr'"),
        (lambda t: LookupOptions(policy="ignore"), ConfigError, "unknown id policy"),
        (lambda t: LookupOptions(dtype="int8"), ConfigError, "float32 or float16"),
    ],
)
def test_wrong_calls_are_refused(open_tables, call, error, message):
    with pytest.raises(error, match=message):
        call(open_tables())


def test_threads_share_a_client(open_tables):
    tables, expected, wrong = open_tables(deadline_ms=5000), table_values("items"), []

    def look_up(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            ids = rng.integers(0, 10_007, 500)
            rows, _ = tables.lookup("items", ids, LookupOptions(dtype="float16"))
            wrong.extend([seed] * int((rows != expected[ids]).any()))

    threads = [threading.Thread(target=look_up, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert tables.counters()["requests"] == 120


@contextmanager
def changed(tables, row, value):
    """A row of items with another value, or with none."""
    version, cluster = tables.tables["items"], tables._cluster
    key = partition_key(version, row)
    field = int(row).to_bytes(8, "little")
    before = cluster.execute("HMGET", key, field)[0]
    assert before == table_values("items")[row].tobytes()
    cluster.execute("HSET", key, field, value) if value is not None else cluster.execute("HDEL", key, field)
    try:
        yield
    finally:
        cluster.execute("HSET", key, field, before)


DAMAGE = {
    "missing": (None, "rows_missing", "1 missing"),
    "too short": (b"x" * 63, "rows_refused", "1 refused"),
    "too long": (b"x" * 65, "rows_refused", "1 refused"),
    "empty": (b"", "rows_refused", "1 refused"),
    "of 2 MB": (b"x" * (2 << 20), "rows_refused", "1 refused"),
}
IDS = np.asarray([5, 17, 6, 17, 7])


@pytest.mark.parametrize(("value", "counter", "told"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_row_harms_no_other(open_tables, folder, value, counter, told):
    good = table_values("items")
    failing, lenient = open_tables(), open_tables(on_failure="default")
    covered = open_tables(local=folder)
    with changed(failing, 17, value):
        with pytest.raises(
            RemoteError, match=f"table 'items', version 'v1': of 5 rows {told.replace('1', '2')}.*row 17"
        ):
            failing.lookup("items", IDS)
        rows, status = lenient.lookup("items", IDS, LookupOptions(dtype="float16"))
        local_rows, local_status = covered.lookup("items", IDS, LookupOptions(dtype="float16"))
    np.testing.assert_array_equal(rows[[0, 2, 4]], good[[5, 6, 7]])
    assert not rows[[1, 3]].any()
    assert status.tolist() == [2, 3, 2, 3, 2]
    np.testing.assert_array_equal(local_rows, good[IDS])
    assert local_status.tolist() == [2, 1, 2, 1, 2]
    assert lenient.counters()[counter] == covered.counters()[counter] == 1
    assert (lenient.counters()["rows_default"], covered.counters()["rows_local"]) == (2, 2)
    assert failing.counters()["requests_failed"] == 1


def test_a_key_of_another_type_is_refused(open_tables):
    tables = open_tables(on_failure="default")
    version = tables.tables["items"]
    key, cluster = partition_key(version, 17), tables._cluster
    spare = key.replace("}", "}:spare")
    cluster.execute("RENAME", key, spare)
    try:
        cluster.execute("SET", key, "text")
        rows, status = tables.lookup("items", np.arange(10_007), LookupOptions(dtype="float16"))
    finally:
        cluster.execute("RENAME", spare, key)
    lost = status == RowStatus.MISSING
    assert lost[17]
    assert 0 < lost.sum() == tables.counters()["rows_refused"] < 10_007 / 16
    np.testing.assert_array_equal(rows[~lost], table_values("items")[~lost])


def test_a_local_copy_must_hold_the_same_rows(open_tables, tmp_path):
    write_folder(tmp_path / "other", seed=1)
    with pytest.raises(ArtefactError, match="holds other rows of table 'items' than version 'v1'"):
        open_tables(local=tmp_path / "other")


def test_tables_keep_the_version_that_they_were_opened_at(open_tables, tmp_path, folder):
    tables, pinned = open_tables(local=folder), {"items": "v1", "users": "v1"}
    cluster = tables._cluster
    push(cluster, write_folder(tmp_path / "v2", seed=2), "v2")
    ids, options = np.arange(311), LookupOptions(dtype="float32")
    try:
        assert [publish(cluster, name, "v2") for name in SHAPES] == ["v1", "v1"]
        np.testing.assert_array_equal(tables.lookup("users", ids, options)[0], table_values("users"))
        with pytest.raises(ArtefactError, match="holds other rows"):
            open_tables(local=folder)
        found = open_tables(local=tmp_path / "v2")
        assert {table.version for table in found.tables.values()} == {"v2"}
        np.testing.assert_array_equal(found.lookup("users", ids, options)[0], table_values("users", seed=2))
        for old in (tables, open_tables(versions=pinned)):
            np.testing.assert_array_equal(old.lookup("users", ids, options)[0], table_values("users"))
        with pytest.raises(RemoteError, match="is in use"):
            retire(cluster, "users", "v2", 1)
    finally:
        for name in SHAPES:
            publish(cluster, name, "v1")
    assert retire(cluster, "users", "v2", 600) == 9
    assert cluster.execute("TTL", "e:{users:v2}") > 0


@pytest.mark.parametrize(
    ("names", "versions", "message"),
    [
        (["never"], None, "'never' has no version in use"),
        (["items"], {"items": "v9"}, "'v9' of table 'items' is not complete"),
    ],
)
def test_versions_that_are_not_there(open_tables, names, versions, message):
    with pytest.raises(RemoteError, match=message):
        open_tables(names, versions=versions)


def test_an_incomplete_version_is_not_read(open_tables):
    cluster = open_tables()._cluster
    cluster.execute("HSET", "e:{users:v1}", "complete", "0")
    try:
        with pytest.raises(RemoteError, match="not complete"):
            open_tables()
        with pytest.raises(RemoteError, match="not complete"):
            publish(cluster, "users", "v1")
    finally:
        cluster.execute("HSET", "e:{users:v1}", "complete", "1")


def test_a_closed_client_says_so(open_tables):
    tables = open_tables()
    tables._cluster.close()
    with pytest.raises(RemoteError, match="closed"):
        tables.lookup("users", IDS)
