"""Overlays become part of the rows in memory, beneath nobody who reads them."""

import dataclasses

import pytest
from table_versions import (
    ROWS,
    answer,
    opener,
    replaced,
    rows_of,
    size_of,
    some_ids,
    write_delta,
    write_version,
)

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.tables import overlay
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.live import Live
from hstu_trt.tables.table_arrays import write_rows


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
