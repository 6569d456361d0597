"""Nodes that die, hang, move keys or close connections, in a real cluster: deadlines hold, and no row is wrong."""

import signal
import threading
import time

import numpy as np
import pytest
from remote_tables import master_of, partition_key, table_values
from waiting import eventually

from hstu_trt.tables.host import LookupOptions
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = [pytest.mark.redis, pytest.mark.faults]

ALL = np.arange(10_007)
NO_TAKEOVER = "cluster-replica-no-failover"
FP16 = LookupOptions(dtype="float16")
HEALTHY_MS = 500
"""A deadline that a node that runs keeps, on a loaded machine too."""
SLACK_MS = 200
"""What a loaded machine may add to a deadline: copying rows, filling in defaults, and its scheduler."""


@pytest.fixture(scope="module")
def items():
    return table_values("items")


@pytest.fixture
def no_takeover(unharmed):
    """A master that is stopped stays the master, for as long as a busy machine may take."""
    for node in unharmed.nodes:
        node.command("CONFIG", "SET", NO_TAKEOVER, "yes")
    yield
    for node in unharmed.nodes:
        node.signal(signal.SIGCONT)
        node.command("CONFIG", "SET", NO_TAKEOVER, "no")


def timed(tables, deadline_ms, ids=ALL):
    started = time.monotonic()
    rows, status = tables.lookup("items", ids, FP16, deadline_ms=deadline_ms)
    return rows, status, (time.monotonic() - started) * 1e3


def test_a_hung_master_is_read_from_its_replica(open_tables, unharmed, no_takeover, items):
    tables = open_tables(cluster={"breaker_failures": 2, "breaker_open_ms": 2000.0})
    timed(tables, 1000)
    master = master_of(unharmed, partition_key(tables.tables["items"], 0))
    master.signal(signal.SIGSTOP)
    for _ in range(2):
        rows, status, took_ms = timed(tables, HEALTHY_MS)
        np.testing.assert_array_equal(rows, items)
        assert (status == RowStatus.REMOTE).all()
        assert took_ms < HEALTHY_MS + SLACK_MS
    assert tables._cluster.breakers()[master.name]
    # Its breaker is open: nobody waits for it any more, which would take half of the time.
    rows, _, took_ms = timed(tables, HEALTHY_MS)
    np.testing.assert_array_equal(rows, items)
    counted = tables.counters()
    assert counted["breaker_opened"] == 1 and counted["node_timeouts"] >= 2, "others may have been late once"
    assert counted["replica_commands"] > 0 < counted["breaker_skips"]
    assert took_ms < HEALTHY_MS / 2
    master.signal(signal.SIGCONT)

    def is_asked_again():
        timed(tables, 1000)
        return not tables._cluster.breakers()[master.name]

    eventually(is_asked_again)


def test_the_deadline_holds_without_replicas(open_tables, unharmed, no_takeover, items, folder):
    options = {"replica_reads": False, "breaker_failures": 2, "breaker_open_ms": 60_000.0}
    lenient, failing = open_tables(on_failure="default", cluster=options), open_tables(cluster=options)
    covered, hurried = (open_tables(local=folder, cluster=options) for _ in range(2))
    version = lenient.tables["items"]
    master = master_of(unharmed, partition_key(version, 0))
    for tables in (lenient, covered, hurried, failing):
        timed(tables, 1000)
    master.signal(signal.SIGSTOP)
    # A deadline that the other nodes keep on a busy machine too; a short one, that they need not keep, comes last.
    for _ in range(2):
        rows, status, took_ms = timed(lenient, HEALTHY_MS)
        assert took_ms < HEALTHY_MS + SLACK_MS
    lost = status == RowStatus.UNAVAILABLE
    assert 0.2 < lost.mean() < 0.5
    assert (status[~lost] == RowStatus.REMOTE).all()
    np.testing.assert_array_equal(rows[~lost], items[~lost])
    assert not rows[lost].any()
    rows, status, took_ms = timed(covered, HEALTHY_MS)
    np.testing.assert_array_equal(rows, items)
    np.testing.assert_array_equal(status == RowStatus.HOST, lost)
    with pytest.raises(RemoteError, match=rf"{lost.sum()} unavailable.*node {master.name}: no reply in time"):
        timed(failing, HEALTHY_MS)
    *_, took_ms = timed(lenient, HEALTHY_MS)
    assert took_ms < HEALTHY_MS, "nobody waits for a node whose breaker is open"
    assert lenient.counters()["breaker_skips"] > 0
    rows, status, took_ms = timed(hurried, 50)
    assert took_ms < 50 + SLACK_MS
    np.testing.assert_array_equal(rows, items)
    assert (status[lost] == RowStatus.HOST).all()


def test_a_killed_master_costs_no_row(open_tables, unharmed, items):
    tables, killed_at = open_tables(), None
    master = master_of(unharmed, partition_key(tables.tables["items"], 1))
    slowest, lookups, limit = 0.0, 0, time.monotonic() + 60
    while tables.counters()["map_refreshes"] < 3 or master_of_or_none(unharmed, master) is None:
        assert time.monotonic() < limit, "no replica took over"
        if lookups == 3:
            master.kill()
            killed_at = lookups
        rows, status, took_ms = timed(tables, 1000, ALL[lookups % 7 :: 7])
        np.testing.assert_array_equal(rows, items[lookups % 7 :: 7])
        assert (status == RowStatus.REMOTE).all()
        slowest, lookups = max(slowest, took_ms), lookups + 1
        time.sleep(0.02)
    assert killed_at is not None
    assert lookups > 20
    assert slowest < 1000
    assert tables.counters()["node_failures"] > 0
    rows, *_ = timed(tables, 1000)
    np.testing.assert_array_equal(rows, items)


def master_of_or_none(servers, dead):
    """The node that has taken the place of a dead master, or None."""
    alive = next(node for node in servers.nodes if node is not dead)
    served = {entry[2][1] for entry in alive.command("CLUSTER", "SLOTS")}
    return alive if dead.port not in served else None


def move_key(source, target, key, before_the_end):
    """Moves the slot of a key, and the key in it, as `redis-cli --cluster reshard` does."""
    slot = str(source.command("CLUSTER", "KEYSLOT", key))
    source_id, target_id = (node.command("CLUSTER", "MYID").decode() for node in (source, target))
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    source.command("MIGRATE", "127.0.0.1", str(target.port), key, "0", "2000")
    before_the_end()
    for node in (target, source):
        node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)


def test_resharding_while_reading(open_tables, unharmed, items):
    tables, wrong, stop = open_tables(), [], threading.Event()
    watched, version = open_tables(), tables.tables["items"]

    def read():
        lookups = 0
        while not stop.is_set() or not lookups:
            rows, _, _ = timed(watched, 1000, ALL[lookups % 5 :: 5])
            wrong.extend([lookups] * int((rows != items[lookups % 5 :: 5]).any()))
            lookups += 1

    reader = threading.Thread(target=read)
    reader.start()
    keys = [version.partition_key(partition) for partition in range(12)]
    try:
        for key in keys:
            source = master_of(unharmed, key)
            target = next(node for node in unharmed.nodes if node is not source and unharmed.role(node) == "master")
            move_key(source, target, key, lambda: np.testing.assert_array_equal(timed(tables, 1000)[0], items))
        np.testing.assert_array_equal(timed(tables, 1000)[0], items)
    finally:
        stop.set()
        reader.join()
    assert not wrong
    counted = tables.counters()
    assert counted["ask"] >= len(keys), "each was asked for where it had gone; again, if that came late"
    assert counted["moved"] + counted["map_refreshes"] > 1
    assert counted["rows_unavailable"] == watched.counters()["rows_unavailable"] == 0


def test_connections_closed_between_requests_are_no_failures(open_tables, unharmed, items):
    tables = open_tables()
    timed(tables, 1000)
    for node in unharmed.nodes:
        node.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    rows, *_ = timed(tables, 1000)
    np.testing.assert_array_equal(rows, items)
    assert tables.counters()["node_failures"] == 0
    assert tables.counters()["connects"] >= 6, "three masters, twice, and whoever is asked for a map that falls due"


def test_a_missed_deadline_leaves_no_trace(open_tables, items):
    tables = open_tables(on_failure="default", cluster={"breaker_failures": 1000})
    for deadline_ms in (0, 0.05, 0.3, 1, 2):
        rows, status, _ = timed(tables, deadline_ms)
        there = status == RowStatus.REMOTE
        np.testing.assert_array_equal(rows[there], items[there])
        assert not rows[~there].any()
        np.testing.assert_array_equal(timed(tables, 1000)[0], items)
    assert tables.counters()["rows_unavailable"] >= 10_007


def test_any_node_leads_to_the_others(unharmed):
    nodes = ("127.0.0.1:1", unharmed.nodes[4].name)
    with Cluster(ClusterOptions(nodes=nodes)) as cluster:
        assert set(unharmed.names) < set(cluster.breakers())


def test_nobody_there(unharmed):
    with pytest.raises(RemoteError, match=r"cluster 127\.0\.0\.1:1: node 127\.0\.0\.1:1: Connection refused"):
        Cluster(ClusterOptions(nodes=("127.0.0.1:1",)))
    with pytest.raises(RemoteError, match="no address"):
        Cluster(ClusterOptions(nodes=("no-such-host.invalid:6379",)))
