"""Tables in several tiers at once, from a real cluster: the rows of the host tier, one round trip, one version."""

import shutil
import signal
import time

import numpy as np
import pytest
from remote_tables import FEATURES, push, table_values, write_folder

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.tables import remote_group
from hstu_trt.tables.gather import NumpyGather
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import POLICIES, RowStatus
from hstu_trt.tables.overlay import Overlay, overlaid_tables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import publish, retire
from hstu_trt.tables.remote_resp import RemoteError
from hstu_trt.tables.table_arrays import open_arrays
from hstu_trt.tables.tier_settings import TierSettings
from hstu_trt.tables.tiers import IdsPart, TieredTables, Tiers, lookup_parts

pytestmark = pytest.mark.redis

ALL = ["item", "user", "candidate"]
IDS = np.random.default_rng(5).integers(0, 311, (400, 3))
BAD = np.asarray([[3, 311, 4], [-1, 5, 10_007], [2**40, -(2**62), -1]])


@pytest.fixture
def open_tiers(pushed, folder):
    """``open_tiers(items={...}, users={...}, folder=...)``: a remote entry gets the nodes of the cluster."""
    opened = []

    def open_them(folder=folder, **entries):
        nodes = {"nodes": list(pushed.names), "deadline_ms": 2000}
        tables = {name: {**nodes, **entry} if entry["tier"] == "remote" else entry for name, entry in entries.items()}
        tiers = Tiers(TierSettings.from_json({"tables": tables}))
        opened.append(tiers)
        return tiers.open_tables(folder), tiers

    yield open_them
    for tiers in opened:
        tiers.close()


def without_rows(folder, target, table):
    """A copy of a tables folder that lacks the shards of a table."""
    return shutil.copytree(folder, target, ignore=lambda path, names: names if path.endswith(f"/{table}") else [])


PLACEMENTS = {
    "items remote": {"items": {"tier": "remote"}},
    "both remote": {"items": {"tier": "remote"}, "users": {"tier": "remote"}},
    "two groups": {"items": {"tier": "remote"}, "users": {"tier": "remote", "deadline_ms": 1999}},
    "remote and resident": {"items": {"tier": "remote"}, "users": {"tier": "resident"}},
    "all here": {"items": {"tier": "resident"}},
}


@pytest.mark.parametrize("entries", PLACEMENTS.values(), ids=PLACEMENTS)
def test_rows_are_those_of_the_host(open_tiers, folder, entries):
    tables, _ = open_tiers(**entries)
    host = HostTables.open(folder)
    for policy in POLICIES:
        options = LookupOptions(policy=policy, padding_id=-1, dtype="float16")
        ids = IDS if policy == "reject" else np.concatenate([IDS, BAD])
        expected, told = host.lookup_features_with_status(ALL, ids, options)
        rows, status = tables.lookup_features_with_status(ALL, ids, options)
        np.testing.assert_array_equal(rows.view(np.uint16), expected.view(np.uint16))
        remote = [entries.get(name, {"tier": ""})["tier"] == "remote" for name in ("items", "users", "items")]
        wanted = np.where((told == RowStatus.HOST) & np.asarray(remote), RowStatus.REMOTE, told)
        np.testing.assert_array_equal(status, wanted)
    assert tables.bad_ids == host.bad_ids == {"items": 4 * 2, "users": 4 * 2}


def test_all_parts_of_a_request_share_a_round_trip(open_tiers, folder):
    tables, tiers = open_tiers(items={"tier": "remote"}, users={"tier": "remote"})
    (cluster,) = tiers._clusters.values()
    parts = [
        IdsPart(features=["item"], ids=IDS[:, :1], options=LookupOptions(what="uih_ids")),
        IdsPart(features=["user", "candidate"], ids=IDS[:7, 1:], options=LookupOptions(dtype="float16")),
        IdsPart(features=["user"], ids=IDS[:0, :1], options=LookupOptions()),
    ]
    before = cluster.counters()["requests"]
    answers = lookup_parts(tables, parts)
    assert cluster.counters()["requests"] == before + 1
    host = HostTables.open(folder)
    for (rows, status), part in zip(answers, parts, strict=True):
        expected, _ = host.lookup_features_with_status(part.features, part.ids, part.options)
        np.testing.assert_array_equal(rows, expected)
        assert rows.dtype == expected.dtype
        assert status.shape == part.ids.shape


def test_a_rejected_id_is_named_as_on_the_host(open_tiers, folder):
    tables, _ = open_tiers(items={"tier": "remote"})
    for place, feature in ((1, "user"), (2, "candidate")):
        ids = IDS.copy()
        ids[5, place] = 20_000
        for source in (tables, HostTables.open(folder)):
            with pytest.raises(InputError, match=rf"'uih_ids' \(feature '{feature}'\) holds 20000 at \[5, {place}\]"):
                source.lookup_features_with_status(ALL, ids, LookupOptions(what="uih_ids"))
    with pytest.raises(InputError, match="must have 3 columns"):
        tables.lookup_features_with_status(ALL, IDS[:, :2], LookupOptions())


def test_rows_that_are_not_here_come_from_the_cluster(open_tiers, folder, tmp_path):
    bare = without_rows(folder, tmp_path / "bare", "items")
    tables, _ = open_tiers(bare, items={"tier": "remote", "local_copy": False})
    rows, status = tables.lookup_features_with_status(["item"], IDS[:, :1], LookupOptions(dtype="float16"))
    np.testing.assert_array_equal(rows, table_values("items")[IDS[:, 0]])
    assert (status == RowStatus.REMOTE).all()
    with pytest.raises(ArtefactError, match="is missing"):
        open_tiers(bare, items={"tier": "remote"})


@pytest.mark.parametrize("on_failure", ["fail", "default"])
def test_what_nobody_gives(open_tiers, folder, on_failure):
    entry = {"tier": "remote", "deadline_ms": 0.001}
    covered, _ = open_tiers(items=entry)
    rows, status = covered.lookup_features_with_status(["item"], IDS[:, :1], LookupOptions(dtype="float16"))
    np.testing.assert_array_equal(rows, table_values("items")[IDS[:, 0]])
    assert set(status.ravel().tolist()) <= {RowStatus.HOST, RowStatus.REMOTE}
    lonely, _ = open_tiers(items={**entry, "local_copy": False, "on_failure": on_failure})
    if on_failure == "fail":
        with pytest.raises(RemoteError, match=r"table 'items', version 'v1': of 400 rows .* unavailable"):
            lonely.lookup_features_with_status(["item"], IDS[:, :1], LookupOptions())
    else:
        rows, status = lonely.lookup_features_with_status(["item"], IDS[:, :1], LookupOptions())
        assert (status == RowStatus.UNAVAILABLE).any()
        assert not rows[(status == RowStatus.UNAVAILABLE)[:, 0]].any()


def test_versions_follow_the_folder_and_share_connections(open_tiers, pushed, folder, tmp_path):
    """Whatever version the cluster calls the one in use: a folder's rows are its own."""
    second = write_folder(tmp_path / "v2", seed=77)
    tables, tiers = open_tiers(items={"tier": "remote"})
    with pytest.raises(RemoteError, match=r"no complete version of table 'items'.*tables push .*v2 --cluster"):
        tiers.open_tables(second)
    with Cluster(ClusterOptions(nodes=pushed.names)) as cluster:
        push(cluster, second, "w2")
        newer = tiers.open_tables(second)
        assert tiers.remote_versions(newer.folder) == {"items": "w2"}
        assert tiers.remote_versions(tables.folder) == {"items": "v1"}
        assert len(tiers._clusters) == 1
        for source, seed in ((tables, 0), (newer, 77)):
            rows, status = source.lookup_features_with_status(["item"], IDS[:, :1], LookupOptions(dtype="float16"))
            np.testing.assert_array_equal(rows, table_values("items", seed)[IDS[:, 0]])
            assert (status == RowStatus.REMOTE).all()
        retire(cluster, "items", "w2", 1)
        with pytest.raises(RemoteError, match="no complete version"):
            tiers.open_tables(second)
        retire(cluster, "users", "w2", 1)


def test_a_remote_table_is_a_gather_like_any_other(open_tiers, folder):
    """What an overlay asks for the rows that it lacks."""
    tables, _ = open_tiers(items={"tier": "remote"})
    assert isinstance(tables, TieredTables)
    stored = tables.tables["items"]
    other = NumpyGather(open_arrays(folder, stored))
    ids = np.concatenate([IDS[:, 0], [-1, 10_007]])
    for policy in POLICIES:
        answers = []
        for gather in (tables.gathers["items"], other):
            # Columns of wider arrays, as a lookup of several features passes them.
            out, status = np.zeros((len(ids), stored.dim + 5), np.float32)[:, 2:-3], np.zeros((len(ids), 2), np.uint8)
            answers.append((gather.lookup(ids, out, status[:, 1], policy, None), out, status[:, 1]))
        (outcome, rows, status), (expected, expected_rows, expected_status) = answers
        assert outcome == expected
        if expected.rejected is None:
            np.testing.assert_array_equal(rows, expected_rows)
            np.testing.assert_array_equal(np.where(status == RowStatus.REMOTE, RowStatus.HOST, status), expected_status)


def test_settings_of_unknown_tables_are_refused(open_tiers):
    with pytest.raises(ConfigError, match="no table 'item'; did you mean 'items'"):
        open_tiers(item={"tier": "remote"})


def test_a_cluster_out_of_reach_is_named(folder):
    settings = {"items": {"tier": "remote", "nodes": ["127.0.0.1:1"], "local_copy": False}}
    tiers = Tiers(TierSettings.from_json({"tables": settings}))
    for attempt in (
        tiers.open_tables,
        lambda path: tiers.remote_versions(HostTables.open(path).folder, need_all=False),
    ):
        with pytest.raises(RemoteError, match=r"cluster 127\.0\.0\.1:1: .*refused"):
            attempt(folder)


def test_a_local_copy_serves_until_the_cluster_is_there(unharmed, folder, open_tiers, monkeypatch):
    monkeypatch.setattr(remote_group, "RETRY_S", 0.05)
    for node in unharmed.nodes:
        node.kill()
    tables, tiers = open_tiers(items={"tier": "remote"}, users={"tier": "remote"})
    assert tiers.remote_versions(tables.folder, need_all=False) == {}
    with pytest.raises(RemoteError, match="refused"):
        tiers.remote_versions(tables.folder)
    laid = overlaid_tables(tables, tables.folder, {}, {})
    expected, told = HostTables.open(folder).lookup_features_with_status(ALL, IDS, LookupOptions())
    for source in (tables, laid):
        rows, status = source.lookup_features_with_status(ALL, IDS, LookupOptions())
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(status, told)
    for node in unharmed.nodes:
        node.start()
    unharmed.wait()
    push_again(unharmed, folder)
    limit = time.monotonic() + 60
    while (status == RowStatus.HOST).any() and time.monotonic() < limit:
        time.sleep(0.05)
        rows, status = laid.lookup_features_with_status(ALL, IDS, LookupOptions())
        np.testing.assert_array_equal(rows, expected)
    assert (status == RowStatus.REMOTE).all()


def push_again(servers, folder):
    """Servers that were killed have forgotten everything."""
    with Cluster(ClusterOptions(nodes=servers.names)) as cluster:
        push(cluster, folder, "v1")
        for name in ("items", "users"):
            publish(cluster, name, "v1")


def test_round_trips_and_the_deadline_are_a_requests(open_tiers, unharmed):
    """However many groups of settings, parts and overlays there are."""
    lost = {"tier": "remote", "local_copy": False, "on_failure": "default", "deadline_ms": 1000}
    one_group, tiers = open_tiers(items=lost, users=lost)
    laid = overlaid_tables(one_group, one_group.folder, {}, {})
    (cluster,) = tiers._clusters.values()
    part = IdsPart(features=ALL, ids=IDS, options=LookupOptions())
    before = cluster.counters()["requests"]
    lookup_parts(laid, [part, part])
    assert cluster.counters()["requests"] == before + 1
    two_groups, _ = open_tiers(items=lost, users={**lost, "deadline_ms": 999})
    over_remote = overlaid_tables(one_group, one_group.folder, {"items": nothing_over(one_group, "items")}, {})
    for node in unharmed.nodes:
        node.signal(signal.SIGSTOP)
    for tables in (two_groups, over_remote):
        began = time.monotonic()
        ((_, status), _) = lookup_parts(tables, [part, part])
        assert time.monotonic() - began < 1.8, "two deadlines, one after the other"
        assert (status == RowStatus.UNAVAILABLE).all()


def nothing_over(tables, name):
    """An overlay without rows."""
    stored = tables.tables[name]
    values = np.empty((0, stored.dim), stored.dtype)
    return Overlay(table=stored, numbers=np.empty(0, np.int64), values=values, scales=None)


def test_features_of_all_tables_are_known():
    assert set(ALL) == {feature for features in FEATURES.values() for feature in features}
