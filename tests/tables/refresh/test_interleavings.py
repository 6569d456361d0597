"""Refresh while being read: every batch sees exactly one version."""

import dataclasses
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from table_versions import (
    answer,
    flip,
    make_store,
    opener,
    size_of,
    some_ids,
)

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.tables import refresh
from hstu_trt.tables.delta import tables_digest
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.live import Live
from hstu_trt.tables.overlay import fold


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """For tests that change nothing in it. Its x2 is damaged."""
    store = make_store(tmp_path_factory.mktemp("store"))
    flip(store, "x2")
    return store


class Freed:
    """Versions that have been opened, to see whether they are gone."""

    def __init__(self):
        self.arrays = []

    def open(self, folder):
        tables = HostTables.open(folder, resident=True)
        self.arrays.append(weakref.ref(tables.gathers["item"]))
        return tables

    def alive(self):
        return sum(array() is not None for array in self.arrays)


@pytest.fixture
def hurried_threads():
    """Threads that take turns often: more interleavings in less time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


SEEDS = 100


@pytest.fixture(scope="module")
def overall():
    """Folds, and versions seen, by seed. Interleavings without them would prove little."""
    met = []
    yield met
    if len(met) == SEEDS:
        assert sum(folds for folds, _ in met) > 0
        assert len(set().union(*(seen for _, seen in met))) == 3
        assert sum(len(seen) >= 2 for _, seen in met) > SEEDS // 2


class Readers:
    """Threads that look up without end, and compare with what the version that they see must answer."""

    def __init__(self, live, ids, expected):
        self.live, self.ids, self.expected = live, ids, expected
        self.seen, self.wrong, self.stop = set(), 0, threading.Event()

    def __enter__(self):
        self.pool = ThreadPoolExecutor(3)
        self.results = [self.pool.submit(self._read) for _ in range(3)]
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.pool.shutdown()
        for result in self.results:
            result.result()

    def _read(self):
        while not self.stop.is_set():
            with self.live.pin() as version:
                digest = version.digest
                found = [answer(version.rows, self.ids) for _ in range(2)]
            self.seen.add(digest)
            self.wrong += any(rows != self.expected[digest] for rows in found)

    def wait_until_seen(self, digest):
        deadline = time.monotonic() + 60
        while digest not in self.seen and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert digest in self.seen


def names_to_publish(choice):
    """Deltas are mostly followed by the whole version that they lead to, which folds them where room is tight."""
    runs = [["v1"], ["v2"], ["v3"], ["d2", "v2"], ["d2", "v2", "d3", "v3"], ["d3"], ["x2"]]
    return [name for run in choice.choices(runs, [1, 1, 1, 3, 3, 1, 1], k=4) for name in run]


class SlowRequests:
    """Requests that keep their version over several publications."""

    def __init__(self, live, choice, readers):
        self.live, self.choice, self.readers = live, choice, readers
        self.pinned = []

    def turn(self):
        """Begins one, or ends the oldest, by chance; and looks at all."""
        if self.choice.random() < 0.2:
            stack = ExitStack()
            self.pinned.append((stack, stack.enter_context(self.live.pin())))
        for _, version in self.pinned:
            assert answer(version.rows, self.readers.ids) == self.readers.expected[version.digest]
        if self.pinned and self.choice.random() < 0.4:
            self.end()

    def end(self):
        stack, _ = self.pinned.pop(0)
        stack.close()


@pytest.mark.usefixtures("hurried_threads")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_interleavings_see_one_version_each(shared_store, seed, overall, monkeypatch):
    """Lookups in three threads while versions, deltas, rollbacks and bad versions are published in a fourth."""
    store, freed, choice, folds = shared_store, Freed(), random.Random(seed), []
    monkeypatch.setattr(refresh, "fold", lambda base, overlays: (folds.append(1), fold(base, overlays)))
    tight = seed % 2 == 1  # overlays, and folds where the version that they lead to is published
    budget = int(1.6 * size_of(store / "v1")) if tight else 1 << 30
    one = dataclasses.replace(opener(memory_budget=budget), open_tables=freed.open)
    ids = some_ids(seed, 64)
    versions = {name: HostTables.open(store / name, native=False) for name in ("v1", "v2", "v3")}
    expected = {tables_digest(store / name): answer(tables, ids) for name, tables in versions.items()}
    live = Live(one.open(store / "v1", "v1"))
    with Readers(live, ids, expected) as readers:
        slow = SlowRequests(live, choice, readers)
        for name in names_to_publish(choice):
            live.drain(0 if slow.pinned else 0.05)
            try:
                live.swap(one.open(store / name, name, live.current))
            except ArtefactError as error:
                assert name == "x2" or (tight and "does not fit" in str(error)), error
            readers.wait_until_seen(live.current.digest)
            slow.turn()
        while slow.pinned:
            slow.end()
    assert not readers.wrong
    assert live.drain(1)
    assert freed.alive() == 1, "the rows of every version but the one in use are freed"
    live.close()
    assert not freed.alive()
    overall.append((len(folds), readers.seen))


def test_a_batch_keeps_its_version_until_it_ends(store):
    freed = Freed()
    one = dataclasses.replace(opener(), open_tables=freed.open)
    live = Live(one.open(store / "v1", "v1"))
    with live.pin() as version:
        first = answer(version.rows, some_ids())
        live.swap(one.open(store / "v2", "v2", live.current))
        assert live.sweep() == live.draining == 1
        assert not live.drain(0.01)
        assert answer(version.rows, some_ids()) == first
        assert freed.alive() == 2
    del version
    assert live.sweep() == live.draining == 0
    assert freed.alive() == 1
    with live.pin() as version:
        assert answer(version.rows, some_ids()) != first
