"""What decides how a version is opened, and which are refused."""

import dataclasses
import json

import pytest
from table_versions import (
    answer,
    flip,
    opener,
    size_of,
    some_ids,
)

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.tables import refresh
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.refresh import NoRoomError, RefreshOptions

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


def test_the_way_back_from_an_overlay_opens_nothing(store):
    one = opener(memory_budget=1)
    one = dataclasses.replace(one, options=RefreshOptions(memory_budget=6_000))
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


def test_an_overlay_is_a_tenth_of_the_tables_at_most(store, monkeypatch):
    monkeypatch.setattr(refresh, "OVERLAY_SHARE", 0.1)
    one = opener()
    with pytest.raises(ArtefactError, match=r"lays .* over v1, and .* are allowed; publish the whole version"):
        one.open(store / "d3", "d3", one.open(store / "v1", "v1"))
