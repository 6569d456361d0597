"""Tables as the lookup kernel sees them, without a GPU: the overlay's hash, and what is refused before a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hstu_trt.contract.errors import HstuTrtError, InputError
from hstu_trt.contract.ops import EMBEDDING_LOOKUP
from hstu_trt.plugins.embedding import LookupOptions, LookupReport, Policy, lookup_padded, lookup_tables
from hstu_trt.plugins.embedding_tables import DeviceTable, LiveTables, Overlay, overlay_slots
from hstu_trt.plugins.library import KernelLibrary, UnsupportedError
from hstu_trt.tables.ids import POLICIES, splitmix64


def find(slots: NDArray, row: int) -> int:
    """As the kernel searches."""
    mask = len(slots) - 1
    at = int(splitmix64(np.asarray([row]), 0)[0]) & mask
    for _ in range(len(slots)):
        if slots[at, 0] == row:
            return int(slots[at, 1])
        if slots[at, 0] < 0:
            return -1
        at = (at + 1) & mask
    raise AssertionError("no slot is empty")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**62), unique=True, max_size=300))
def test_every_row_of_an_overlay_is_found_and_no_other(rows: list[int]) -> None:
    numbers = np.asarray(rows, np.int64)
    slots = overlay_slots(numbers)
    assert len(slots) >= 2 * len(rows) and len(slots) & (len(slots) - 1) == 0
    assert [find(slots, row) for row in rows] == list(range(len(rows)))
    assert all(find(slots, row + 1) == -1 for row in rows if row + 1 not in set(rows))


HALF, CODES = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 8, dtype=torch.int8)
SCALES = torch.ones(4)
ROWS = np.arange(2)

REFUSED_TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "other width": (lambda: DeviceTable(hot=HALF, cold=HALF[:, :4]), "one type and width"),
    "other type": (lambda: DeviceTable(hot=HALF, cold=HALF.float()), "one type and width"),
    "one axis": (lambda: DeviceTable(hot=HALF[0]), "one type and width"),
    "no type": (lambda: DeviceTable(hot=HALF.double()), "float64 is no type"),
    "no scales": (lambda: DeviceTable(hot=CODES), "int8 rows have a scale each"),
    "scales": (lambda: DeviceTable(hot=HALF, scales=SCALES), "rows have no scale"),
    "few scales": (lambda: DeviceTable(hot=CODES, scales=SCALES[:3]), "have a scale each"),
    "strides": (lambda: DeviceTable(hot=HALF.t().contiguous().t()), "must be contiguous"),
    "double scales": (
        lambda: DeviceTable(hot=CODES, scales=SCALES.double()),
        "scales must be contiguous torch.float32",
    ),
    "scales apart": (lambda: DeviceTable(hot=CODES, scales=torch.ones(4, 2)[:, 0]), "scales must be contiguous"),
    "wide permutation": (
        lambda: DeviceTable(hot=HALF, hash="permutation", row_of_id=torch.arange(4)),
        "row_of_id must be contiguous",
    ),
    "narrow slots": (
        lambda: DeviceTable(hot=HALF, overlay=Overlay(slots=torch.zeros(2, 2), values=HALF)),
        "slots of the overlay",
    ),
    "slots no power of two": (
        lambda: DeviceTable(hot=HALF, overlay=Overlay(slots=torch.full((3, 2), -1), values=HALF)),
        r"\[a power of two, 2\], not \[3, 2\]",
    ),
    "no slots": (
        lambda: DeviceTable(hot=HALF, overlay=Overlay(slots=torch.full((0, 2), -1), values=HALF)),
        r"not \[0, 2\]",
    ),
    "overlay without scales": (
        lambda: DeviceTable(hot=CODES, scales=SCALES, overlay=Overlay.build(ROWS, CODES[:2])),
        "an overlay of 2 torch.int8 rows has no scales",
    ),
    "few scales of an overlay": (
        lambda: DeviceTable(hot=CODES, scales=SCALES, overlay=Overlay.build(ROWS, CODES[:2], SCALES[:1])),
        r"has \[1\] scales",
    ),
    "scales of an overlay of halves": (
        lambda: DeviceTable(hot=HALF, overlay=Overlay.build(ROWS, HALF[:2], SCALES[:2])),
        "none for others",
    ),
    "live rows between": (lambda: LiveTables((DeviceTable(hot=torch.zeros(9, 4).half()[1:]),)), "multiples of 16"),
    "overlay twice": (lambda: Overlay.build(np.asarray([1, 1]), HALF[:2]), "one row per number"),
    "overlay short": (lambda: Overlay.build(ROWS, HALF[:1]), "2 numbers, 1 rows"),
    "overlay below 0": (lambda: Overlay.build(ROWS - 1, HALF[:2]), "row -1 of an overlay"),
    "no live tables": (lambda: LiveTables(()), "at least one"),
}


@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_tables_that_make_no_sense_are_refused(case: str) -> None:
    make, said = REFUSED_TABLES[case]
    with pytest.raises(HstuTrtError, match=said):
        make()


TABLE = DeviceTable(hot=HALF)
IDS = torch.zeros(3, 1, dtype=torch.int64)

REFUSED_CALLS: dict[str, tuple[Callable[[], Any], type[HstuTrtError], str]] = {
    "no tables": (lambda: lookup_tables(IDS[:, :0], ()), UnsupportedError, "1 to 8 tables, not in 0"),
    "nine tables": (lambda: lookup_tables(IDS.expand(3, 9), (TABLE,) * 9), UnsupportedError, "not in 9"),
    "columns": (lambda: lookup_tables(IDS, (TABLE, TABLE)), InputError, r"int64 \[n, 2\], got torch.int64 \[3, 1\]"),
    "float ids": (lambda: lookup_tables(IDS.float(), (TABLE,)), InputError, "got torch.float32"),
    "out": (lambda: lookup_tables(IDS, (TABLE,), out=torch.zeros(3, 8)[:, :4]), InputError, "out must be contiguous"),
    "status": (
        lambda: lookup_tables(IDS, (TABLE,), LookupOptions(), LookupReport(status=torch.zeros(3, dtype=torch.uint8))),
        InputError, r"status must be contiguous uint8 \[3, 1\]",
    ),
    "bad ids": (
        lambda: lookup_tables(IDS, (TABLE,), LookupOptions(), LookupReport(bad_ids=torch.zeros(1))),
        InputError, r"bad_ids must be int64 \[1\]",
    ),
    "latch": (lambda: lookup_tables(IDS, (TABLE,), latch=torch.zeros(1)), InputError, r"latch must be int64 \[1\]"),
    "bad ids apart": (
        lambda: lookup_tables(IDS.expand(3, 2), (TABLE,) * 2, report=LookupReport(bad_ids=torch.zeros(4).long()[::2])),
        InputError, "contiguous",
    ),
    "lengths apart": (
        lambda: lookup_padded(IDS, torch.zeros(6).int()[::2], TABLE), InputError, "contiguous",
    ),
    "lengths": (lambda: lookup_padded(IDS, torch.zeros(3), TABLE), InputError, r"lengths must be int32 \[3\]"),
    "cpu": (lambda: lookup_tables(IDS, (TABLE,)), InputError, "on cpu: this lookup runs on a CUDA GPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_calls_that_make_no_sense_are_refused(library: KernelLibrary, case: str) -> None:
    call, error, said = REFUSED_CALLS[case]
    with pytest.raises(error, match=said):
        call()


def test_policies_have_the_names_and_numbers_of_the_tables_room() -> None:
    assert get_args(Policy) == POLICIES
    (policy,) = (attribute for attribute in EMBEDDING_LOOKUP.attributes if attribute.name == "policy")
    assert policy.default == "zero" and all(name in policy.doc for name in POLICIES)
