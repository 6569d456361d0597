"""Replies that no real node gives: the client neither crashes, hangs, nor takes a row for another one."""

import random
import time

import numpy as np
import pytest
from fake_node import FakeNode, bulks

from hstu_trt.tables.remote_cluster import (
    FOUND,
    MISSING,
    REFUSED,
    UNAVAILABLE,
    Cluster,
    ClusterOptions,
    RemoteRows,
    RowsJob,
)
from hstu_trt.tables.remote_layout import RemoteVersion
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = pytest.mark.redis

ROWS = np.arange(6, dtype=np.int64)
VERSION = RemoteVersion(table="t", version="v", rows=6, dim=2, dtype="float32", features=(), partitions=1, digest="d")

DEADLINE_MS = 2000.0
AT_ONCE_S = 1.5
"""Sooner than the deadline, by what a busy machine may add."""


def value(row):
    return np.full(2, row, np.float32).tobytes()


def honest(parts):
    return bulks([value(int.from_bytes(field, "little")) for field in parts[2:]])


def read(node, deadline_ms=DEADLINE_MS, reads=1, **options):
    """(values, status, trouble, seconds, counters) of the last of some reads."""
    values, status = np.full((6, 2), np.nan, np.float32), np.full(6, 99, np.uint8)
    with Cluster(ClusterOptions(nodes=(node.name,), **options)) as cluster:
        job = RowsJob(table=RemoteRows(VERSION), rows=ROWS, values=values, status=status)
        for _ in range(reads):
            started = time.monotonic()
            trouble = cluster.read([job], deadline_ms)
        return values, status, trouble, time.monotonic() - started, cluster.counters()


def test_the_fake_can_be_honest():
    with FakeNode(honest) as node:
        values, status, trouble, *_ = read(node)
    np.testing.assert_array_equal(values[:, 0], ROWS)
    assert (status == FOUND).all()
    assert trouble == ""
    assert node.seen[0][:2] == [b"HMGET", b"e:{t:v:0}"]


WHOLE = honest([b"HMGET", b"k", *(int(row).to_bytes(8, "little") for row in ROWS)])
NOBODY = [UNAVAILABLE] * 6

BROKEN = {
    "too few values": bulks([value(0)] * 5),
    "too many values": bulks([value(0)] * 7),
    "no array": b"$8\r\n" + value(0) + b"\r\n",
    "a status": b"+OK\r\n",
    "nil": b"*-1\r\n",
    "an array in it": b"*6\r\n*6\r\n" + b"$-1\r\n" * 11,
    "a length that is no number": WHOLE.replace(b"$8", b"$x", 1),
    "a length below -1": WHOLE.replace(b"$8", b"$-2", 1),
    "a length that overflows": WHOLE.replace(b"$8", b"$99999999999999999999", 1),
    "an array without end": b"*999999999\r\n",
    "a line without end": b"+" + b"x" * 70_000,
    "no CR": WHOLE.replace(b"\r\n", b"\n", 1),
    "no CR LF after a value": WHOLE[:-2] + b"xy",
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "nothing, and the end": None,
    "half of it, and the end": [WHOLE[:40], None],
    "an error without a word": b"-\r\n",
    "MOVED to nowhere": b"-MOVED 1\r\n",
    "MOVED of another slot": b"-MOVED 99999 127.0.0.1:1\r\n",
    "MOVED to a port that is none": b"-MOVED 9831 127.0.0.1:99999\r\n",
    "ASK to nowhere": b"-ASK \r\n",
    "a cluster that is down": b"-CLUSTERDOWN Hash slot not served\r\n",
    "loading": b"-LOADING Redis is loading\r\n",
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN.keys())
def test_broken_replies_make_rows_unavailable(reply):
    with FakeNode(lambda parts: reply) as node:
        values, status, trouble, seconds, _ = read(node, reads=2)
    assert status.tolist() == NOBODY
    assert not values.any()
    assert trouble
    assert seconds < AT_ONCE_S


VALUES = {
    "missing": (None, MISSING),
    "short": (b"x" * 7, REFUSED),
    "long": (b"x" * 9, REFUSED),
    "huge": (b"x" * (3 << 20), REFUSED),
}


@pytest.mark.parametrize(("bad", "expected"), VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("place", [0, 3, 5])
def test_one_bad_value_harms_no_other(bad, expected, place):
    with FakeNode(lambda parts: bulks([bad if row == place else value(row) for row in range(6)])) as node:
        values, status, *_ = read(node, deadline_ms=1000)
    assert status.tolist() == [expected if row == place else FOUND for row in range(6)]
    assert values[:, 0].tolist() == [0 if row == place else row for row in range(6)]


def test_wrong_types_are_refused_one_by_one():
    parts = [b":5\r\n", b"+xxxxxxxx\r\n", b"-ERR no\r\n", b"$8\r\n" + value(3) + b"\r\n", b"$-1\r\n", b"*-1\r\n"]
    with FakeNode(lambda _: b"*6\r\n" + b"".join(parts)) as node:
        _, status, *_ = read(node)
    assert status.tolist() == [REFUSED, REFUSED, REFUSED, FOUND, MISSING, MISSING]


def test_a_reply_byte_by_byte():
    with FakeNode(lambda parts: [WHOLE[at : at + 1] for at in range(len(WHOLE))]) as node:
        values, status, *_ = read(node)
    np.testing.assert_array_equal(values[:, 0], ROWS)
    assert (status == FOUND).all()


def test_the_whole_reply_and_the_end_are_not_waited_for():
    with FakeNode(lambda parts: [WHOLE, None]) as node:
        _, status, _, seconds, _ = read(node, reads=3)
    assert (status == FOUND).all()
    assert seconds < AT_ONCE_S


def test_moved_in_a_circle_ends():
    with FakeNode(lambda parts: b"-MOVED 9831 :%d\r\n" % node.port) as node:
        _, status, _, seconds, counters = read(node)
    assert status.tolist() == NOBODY
    assert 1 <= counters["moved"] <= 10
    assert seconds < AT_ONCE_S


def test_moved_to_the_dead_is_unavailable_at_once():
    with FakeNode(lambda parts: b"-MOVED 9831 127.0.0.1:1\r\n") as node:
        _, status, trouble, seconds, _ = read(node)
    assert status.tolist() == NOBODY
    assert "127.0.0.1:1: Connection refused" in trouble
    assert seconds < AT_ONCE_S


def test_random_damage_never_gives_a_wrong_row():
    chosen = random.Random(7)
    pieces = [b"\r\n", b"*", b"$", b"-", b"$-1\r\n", b"*2\r\n", b":", b"9", b"\x00"]
    states = set()

    def damaged(parts):
        reply = bytearray(honest(parts))
        for _ in range(chosen.randint(1, 3)):
            at = chosen.randrange(len(reply))
            # Headers only: no protocol notices a value that was changed into another of the same length.
            header = reply.find(b"$8\r\n", at)
            at = header if header >= 0 else 0
            reply[at : at + chosen.randint(0, 2)] = chosen.choice(pieces)
        return bytes(reply)

    with FakeNode(damaged) as node, Cluster(ClusterOptions(nodes=(node.name,), breaker_failures=10**6)) as cluster:
        rows = RemoteRows(VERSION)
        for _ in range(150):
            values, status = np.full((6, 2), np.nan, np.float32), np.full(6, 99, np.uint8)
            cluster.read([RowsJob(table=rows, rows=ROWS, values=values, status=status)], 5)
            states.update(status.tolist())
            assert set(status.tolist()) <= {FOUND, MISSING, REFUSED, UNAVAILABLE}
            assert not values[status != FOUND].any()
    assert UNAVAILABLE in states


def test_broken_maps_are_refused():
    begin = b"*1\r\n*3\r\n"
    maps = [b"*0\r\n", b"+OK\r\n", begin + b":0\r\n:99999\r\n*2\r\n$0\r\n\r\n:1\r\n", b"*1\r\n*1\r\n:0\r\n", b"x\r\n"]
    maps += [begin + b":9\r\n:3\r\n*2\r\n$0\r\n\r\n:1\r\n", begin + b":0\r\n:1\r\n*2\r\n$0\r\n\r\n:0\r\n"]
    maps += [b"*1\r\n" * 50]
    for reply in maps:
        with FakeNode(honest) as node:
            node.slots = lambda reply=reply: reply
            with pytest.raises(RemoteError, match=f"127.0.0.1:{node.port}"):
                Cluster(ClusterOptions(nodes=(node.name,), connect_ms=100))


def test_a_slow_node_is_not_taken_for_a_dead_one():
    def slow(parts):
        time.sleep(0.08)
        return honest(parts)

    with FakeNode(slow) as node:
        _, status, _, _, counters = read(node, reads=3)
    assert (status == FOUND).all()
    assert counters["node_failures"] == 0
