"""Refresh while being read: overlays answer as the whole version does, and every batch sees exactly one version."""

import dataclasses
import json
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import QuantisedRows, write_vector
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.tables import overlay, refresh
from hstu_trt.tables.delta import make_delta, tables_digest
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.live import Live
from hstu_trt.tables.overlay import fold
from hstu_trt.tables.refresh import NoRoomError, RefreshOptions, VersionOpener
from hstu_trt.tables.table_arrays import write_rows

DIM, ROWS = 8, 300
RULES = {
    "none": IdRule(),
    "splitmix64": IdRule(hash="splitmix64", seed=9),
    "permutation": IdRule(hash="permutation", row_of_id="item/row_of_id.safetensors", default_row=1),
}
OPENERS = {"native": {"native": True, "threads": 2}, "numpy": {"native": False}, "resident": {"resident": True}}
POLICIES = ("zero", "clamp", "row0", "default_row")


def rows_of(seed, rows, dtype):
    values = np.random.default_rng(seed)
    if dtype in ("float32", "float16"):
        return values.standard_normal((rows, DIM)).astype(dtype)
    codes = values.integers(-120, 120, (rows, DIM)).astype(np.int8)
    codes = codes if dtype == "int8" else (codes.view(np.uint8) & 0x7E)
    return QuantisedRows(codes, values.random(rows, np.float32))


def replaced(block, seed, share, dtype):
    """The block with a share of its rows others, by a seed."""
    changed = np.random.default_rng(seed).random(len(block)) < share
    other = rows_of(seed + 1000, len(block), dtype)
    if isinstance(block, QuantisedRows):
        return QuantisedRows(
            np.where(changed[:, None], other.values, block.values), np.where(changed, other.scale, block.scale)
        )
    return np.where(changed[:, None], other, block)


def longer(block, seed, rows, dtype):
    more = rows_of(seed, rows, dtype)
    if isinstance(block, QuantisedRows):
        return QuantisedRows(np.concatenate([block.values, more.values]), np.concatenate([block.scale, more.scale]))
    return np.concatenate([block, more])


def write_version(folder, block, dtype="float16", rule="none", pair_id="p"):
    config = TableConfig(name="item", rows=len(block), dim=DIM, dtype="float16", features=("item_id", "twin"))
    shard_bytes = 128 * DIM * (4 if dtype == "float32" else 2 if dtype == "float16" else 1)
    if rule == "permutation":
        order = np.random.default_rng(5).permutation(len(block)).astype(np.uint32)
        write_vector(folder / "item/row_of_id.safetensors", "row_of_id", order)
    table = write_table(folder, config, [block], shard_bytes, dtype=dtype, ids=RULES[rule])
    write_tables_manifest(folder, [table], "a test", {"pair_id": pair_id})
    return folder


def write_delta(root, name, old, new):
    folders = [read_tables_folder(root / version, regenerate="") for version in (old, new)]
    make_delta(*folders, root / name, lambda table, done: None)
    return root / name


def opener(how="native", **options):
    return VersionOpener(
        open_tables=lambda folder: HostTables.open(folder, **OPENERS[how]),
        memory_of=lambda folder: sum(table.payload_bytes for table in folder.tables.values()),
        options=RefreshOptions(**{"memory_budget": 1 << 30, "overlay_share": 1.0, **options}),
    )


def answer(rows, ids, policy="zero", dtype="float32", padding_id=-7):
    options = LookupOptions(policy=policy, padding_id=padding_id, dtype=dtype)
    found, status = rows.lookup_features_with_status(["item_id", "twin"], ids, options)
    return found.tobytes(), status.tobytes()


def some_ids(seed=0, count=500):
    ids = np.random.default_rng(seed).integers(-5, ROWS + 40, (count, 2))
    ids[:3] = [[-7, 0], [ROWS - 1, ROWS], [np.iinfo(np.int64).max, np.iinfo(np.int64).min]]
    return ids


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e4m3fn"])
def test_overlay_answers_as_the_whole_version(tmp_path, how, rule, dtype):
    first = rows_of(1, ROWS, dtype)
    second = replaced(first, 2, 0.1, dtype)
    third = replaced(second, 3, 0.1, dtype)
    if rule == "none":
        third = longer(third, 4, 17, dtype)
    for name, block in (("v1", first), ("v2", second), ("v3", third)):
        write_version(tmp_path / name, block, dtype, rule)
    deltas = [write_delta(tmp_path, "d2", "v1", "v2"), write_delta(tmp_path, "d3", "v2", "v3")]
    open_one = opener(how)
    held = open_one.open(tmp_path / "v1", "v1")
    for name, delta, whole in zip(("d2", "d3"), deltas, ("v2", "v3"), strict=True):
        held = open_one.open(delta, name, held)
        expected = HostTables.open(tmp_path / whole, native=False)
        assert held.digest == tables_digest(tmp_path / whole)
        assert held.overlays
        for policy in POLICIES:
            for out in ("float32", "float16"):
                assert answer(held.rows, some_ids(), policy, out) == answer(expected, some_ids(), policy, out)
        assert answer(held.rows, some_ids()[:0]) == answer(expected, some_ids()[:0])


@pytest.mark.parametrize("how", OPENERS)
def test_overlay_rejects_what_the_whole_version_rejects(tmp_path, how):
    first = rows_of(1, ROWS, "float16")
    write_version(tmp_path / "v1", first)
    write_version(tmp_path / "v2", longer(first, 2, 5, "float16"))
    write_delta(tmp_path, "d2", "v1", "v2")
    held = opener(how).open(tmp_path / "v1", "v1")
    over = opener(how).open(tmp_path / "d2", "d2", held)
    ids = np.zeros((300, 2), np.int64)
    ids[:, 0] = ROWS + 4
    answer(over.rows, ids, "reject")
    ids[257, 1] = ROWS + 5
    with pytest.raises(InputError, match=rf"holds {ROWS + 5} at \[257, 1\]; table 'item' has {ROWS + 5} rows"):
        answer(over.rows, ids, "reject")
    with pytest.raises(InputError, match=rf"has {ROWS} rows"):
        answer(held.rows, ids, "reject")


def test_an_empty_table_grows_by_an_overlay(tmp_path):
    write_version(tmp_path / "v1", rows_of(1, 0, "float16"))
    write_version(tmp_path / "v2", rows_of(1, 4, "float16"))
    write_delta(tmp_path, "d2", "v1", "v2")
    for how in OPENERS:
        held = opener(how).open(tmp_path / "v1", "v1")
        over = opener(how, overlay_share=2.0).open(tmp_path / "d2", "d2", held)
        ids = np.asarray([[0, 3], [4, -7]])
        for policy in POLICIES:
            assert answer(over.rows, ids, policy) == answer(HostTables.open(tmp_path / "v2"), ids, policy)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """For tests that change nothing in it. Its x2 is damaged."""
    store = make_store(tmp_path_factory.mktemp("store"))
    flip(store, "x2")
    return store


def make_store(tmp_path):
    """v1 to v3, each a tenth changed; d2 and d3 between them, and back to v1; x2 of other dense weights."""
    first = rows_of(1, ROWS, "float16")
    second = replaced(first, 2, 0.1, "float16")
    third = replaced(second, 3, 0.1, "float16")
    for name, block in (("v1", first), ("v2", second), ("v3", third)):
        write_version(tmp_path / name, block)
    write_version(tmp_path / "x2", second, pair_id="other")
    write_delta(tmp_path, "d2", "v1", "v2")
    write_delta(tmp_path, "d3", "v2", "v3")
    write_delta(tmp_path, "back", "v2", "v1")
    return tmp_path


# mode, budget in tables, name of what is published -> whether it becomes an overlay; None: refused
DECISIONS = {
    "two fit": ("auto", 2, "v2", False),
    "two do not fit": ("auto", 1.5, "v2", True),
    "two must": ("swap", 2, "v2", False),
    "two must and do not fit": ("swap", 1.5, "v2", None),
    "overlay wanted": ("overlay", 2, "v2", True),
    "the overlay does not fit either": ("auto", 1.01, "v2", None),
    "a delta is an overlay": ("swap", 2, "d2", True),
    "a delta that does not fit": ("auto", 1.01, "d2", None),
    "deltas of deltas": ("auto", 1.5, "d3", True),
}


@pytest.mark.parametrize(("mode", "budget", "name", "wanted"), DECISIONS.values(), ids=DECISIONS)
def test_what_decides_between_two_versions_and_an_overlay(store, mode, budget, name, wanted):
    tables = read_tables_folder(store / "v1", regenerate="").tables
    size = sum(table.payload_bytes for table in tables.values())
    one = opener(mode=mode, memory_budget=int(budget * size))
    held = one.open(store / "v1", "v1")
    if wanted is None:
        with pytest.raises(ArtefactError, match=r"publish what changed|publish the whole version|rows changed"):
            one.open(store / name, name, held)
        return
    opened = one.open(store / name, name, held)
    assert bool(opened.overlays) == wanted
    assert answer(opened.rows, some_ids()) == answer(HostTables.open(store / name.replace("d", "v")), some_ids())


def test_processes_share_the_memory_that_is_left(store, monkeypatch):
    """Two processes that refresh at the same moment must not each take all that there is."""
    monkeypatch.setattr(refresh, "available_memory", lambda: int(1.5 * size_of(store / "v2")))
    for processes, overlaid in ((1, False), (2, True)):
        one = opener(memory_budget=None, processes=processes)
        held = one.open(store / "v1", "v1")
        assert bool(one.open(store / "v2", "v2", held).overlays) == overlaid


def test_memory_that_the_machine_lacks_is_no_fault_of_the_version(store, monkeypatch):
    """Tried again later, where a budget that is given will not grow."""
    monkeypatch.setattr(refresh, "available_memory", lambda: 0)
    for budget, error in ((None, NoRoomError), (0, ArtefactError)):
        one = opener(memory_budget=budget)
        held = one.open(store / "v1", "v1")
        with pytest.raises(ArtefactError) as caught:
            one.open(store / "d2", "d2", held)
        assert type(caught.value) is error


def size_of(folder):
    tables = read_tables_folder(folder, regenerate="").tables
    return sum(table.payload_bytes for table in tables.values())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("native", [True, False])
def test_the_whole_version_of_an_overlay_folds_it(tmp_path, dtype, native):
    """Delta after delta within a budget that two whole versions do not fit."""
    block = rows_of(1, ROWS, dtype)
    for number in range(1, 6):
        write_version(tmp_path / f"v{number}", block, dtype)
        block = replaced(block, number, 0.2, dtype)
    budget = int(1.5 * size_of(tmp_path / "v1"))
    one = dataclasses.replace(
        opener(memory_budget=budget), open_tables=lambda folder: HostTables.open(folder, resident=True, native=native)
    )
    live = Live(one.open(tmp_path / "v1", "v1"))
    for number in range(2, 6):
        delta = write_delta(tmp_path, f"d{number}", f"v{number - 1}", f"v{number}")
        whole = tmp_path / f"v{number}"
        expected = answer(HostTables.open(whole, native=False), some_ids())
        live.swap(one.open(delta, delta.name, live.current))
        assert live.current.overlays
        with live.pin() as version:
            live.swap(one.open(whole, whole.name, live.current))
            assert answer(version.rows, some_ids()) == expected, "still read while it is folded"
        live.sweep()
        assert not live.current.overlays
        assert live.current.memory_bytes == size_of(whole)
        assert answer(live.current.rows, some_ids()) == expected
    live.swap(one.open(tmp_path / "v4", "v4", live.current))
    assert live.current.overlays, "the way back is an overlay now"
    assert answer(live.current.rows, some_ids()) == answer(HostTables.open(tmp_path / "v4"), some_ids())


def test_nothing_is_folded_while_the_base_is_read(store):
    one = opener(memory_budget=int(1.5 * size_of(store / "v1")), how="resident")
    live = Live(one.open(store / "v1", "v1"))
    with live.pin() as version:
        before = answer(version.rows, some_ids())
        live.swap(one.open(store / "d2", "d2", live.current))
        live.swap(one.open(store / "v2", "v2", live.current))
        assert live.current.overlays
        assert answer(version.rows, some_ids()) == before
        with live.pin() as current:
            assert answer(current.rows, some_ids()) == answer(HostTables.open(store / "v2"), some_ids())


@pytest.mark.parametrize("native", [True, False])
def test_no_second_fold_beneath_who_reads_since_before_the_first(store, native):
    one = dataclasses.replace(
        opener(memory_budget=int(1.5 * size_of(store / "v1"))),
        open_tables=lambda folder: HostTables.open(folder, resident=True, native=native),
    )
    expected = {name: answer(HostTables.open(store / name), some_ids()) for name in ("v2", "v3")}
    live = Live(one.open(store / "v1", "v1"))
    live.swap(one.open(store / "d2", "d2", live.current))
    live.sweep()
    with live.pin() as version:
        for name in ("v2", "d3", "v3"):
            live.swap(one.open(store / name, name, live.current))
            assert answer(version.rows, some_ids()) == expected["v2"], name
            assert answer(live.current.rows, some_ids()) == expected[name.replace("d", "v")]
            assert bool(live.current.overlays) == (name != "v2"), "v2 is folded, v3 must wait"
    live.sweep()
    live.swap(one.open(store / "v3", "v3", live.current))
    assert not live.current.overlays, "folded once nobody reads what was there before"
    assert answer(live.current.rows, some_ids()) == expected["v3"]


def test_rows_that_are_half_folded_are_nobodys(store, monkeypatch):
    one = opener(memory_budget=int(1.5 * size_of(store / "v1")), how="resident")
    live = Live(one.open(store / "v1", "v1"))
    live.swap(one.open(store / "d2", "d2", live.current))
    live.sweep()
    expected = answer(HostTables.open(store / "v2"), some_ids())

    def write_half(arrays, numbers, values, scales):
        write_rows(arrays, numbers[::2], values[::2], scales)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(overlay, "write_rows", write_half)
        with pytest.raises(MemoryError):
            one.open(store / "v2", "v2", live.current)
    assert answer(live.current.rows, some_ids()) == expected
    with pytest.raises(ArtefactError, match="beneath d2 are half written over; publish its whole version again"):
        one.open(store / "v1", "v1", live.current)
    with pytest.raises(ArtefactError, match="does not fit"):
        one.open(store / "back", "back", live.current)
    live.swap(one.open(store / "v2", "v2", live.current))
    assert not live.current.overlays
    assert answer(live.current.rows, some_ids()) == expected


def test_the_way_back_from_an_overlay_opens_nothing(store):
    one = opener(memory_budget=1)
    one = dataclasses.replace(one, options=RefreshOptions(memory_budget=6_000, overlay_share=1.0))
    held = one.open(store / "v1", "v1")
    over = one.open(store / "d2", "d2", held)
    held.close()
    back = one.open(store / "v1", "v1", over)
    over.close()
    assert back.rows is held.rows
    assert answer(back.rows, some_ids()) == answer(HostTables.open(store / "v1"), some_ids())


def test_a_delta_is_opened_with_its_base(store):
    for name in ("d2", "d3"):
        opened = opener().open(store / name, name)
        assert answer(opened.rows, some_ids()) == answer(HostTables.open(store / name.replace("d", "v")), some_ids())


def spoil(path, change):
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


def flip(store, name):
    path = next((store / name).glob("item/0*.safetensors"))
    content = bytearray(path.read_bytes())
    content[4096 + 3] ^= 1
    path.write_bytes(content)


def lead_out(store):
    (store / "d2/item/00000.safetensors").rename(store / "elsewhere")
    (store / "d2/item/00000.safetensors").symlink_to(store / "elsewhere")


def remove(store, *names):
    for name in names:
        (store / name).rename(store / f".{name}")  # as if half removed


BAD = {
    "damaged": (lambda store: flip(store, "v2"), "v2", "does not match the sha256"),
    "damaged delta": (lambda store: flip(store, "d2"), "d2", "does not match the sha256"),
    "cut short": (lambda store: (store / "v2/item/00001.safetensors").write_bytes(b"x"), "v2", "has 1 bytes"),
    "no manifest": (lambda store: (store / "v2/manifest.json").unlink(), "v2", "manifest.json is not readable"),
    "path outside": (
        lambda store: spoil(store / "v2", lambda d: d["files"].update({"../v1/manifest.json": {"bytes": 1}})),
        "v2",
        "names a file outside its folder",
    ),
    "delta names a path outside": (
        lambda store: spoil(store / "d2", lambda d: d["files"].update({"/etc/passwd": {"bytes": 1}})),
        "d2",
        "names a file outside its folder",
    ),
    "delta's rows behind a link": (lead_out, "d2", "leads outside of the folder"),
    "delta without sha256 of its rows": (
        lambda store: spoil(store / "d2", lambda d: d["files"].clear()),
        "d2",
        "not among the manifest's files",
    ),
    "base is gone": (lambda store: remove(store, "v1", "back"), "d2", "leads on from version None .*no whole version"),
    "deltas in a circle": (lambda store: remove(store, "v1", "v2", "x2"), "d2", "no whole version"),
    "another kind": (lambda store: spoil(store / "v2", lambda d: d.update(kind="deployment")), "v2", "a delta or a"),
}


@pytest.mark.parametrize(("damage", "name", "says"), BAD.values(), ids=BAD)
def test_bad_versions_are_refused_and_the_old_one_goes_on(store, damage, name, says):
    one = opener()
    held = one.open(store / "v3", "v3")
    before = answer(held.rows, some_ids())
    damage(store)
    with pytest.raises((ArtefactError, ConfigError), match=says):
        one.open(store / name, name, held)
    assert answer(held.rows, some_ids()) == before


def test_what_the_model_cannot_use_is_refused(store):
    def check(folder):
        if folder.pair_id != "p":
            raise ArtefactError(f"{folder.path} belongs to {folder.pair_id}")

    one = dataclasses.replace(opener(), check=check)
    for name in ("v1", "v2"):  # x2 has the rows of v2
        with pytest.raises(ArtefactError, match="belongs to other"):
            one.open(store / "x2", "x2", one.open(store / name, name))


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
        deadline = time.monotonic() + 10
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
