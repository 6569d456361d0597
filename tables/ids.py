"""From ids to rows: hashing, id policies, and a status per row. ``csrc/ids.h`` says the same in C++.

    none          row = id
    splitmix64    row = high 64 bits of splitmix64(id ^ seed) * rows ("fastrange": no division); no id is bad
    permutation   row = row_of_id[id]

splitmix64 is the generator of Steele, Lea and Flood (OOPSLA 2014), with the id as its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.stored_table import IdRule

Policy = Literal["reject", "zero", "clamp", "row0", "default_row"]
POLICIES: tuple[Policy, ...] = ("reject", "zero", "clamp", "row0", "default_row")

ZERO_ROW = -1
"""Stands for a row of zeros where a row number is due."""


class RowStatus(IntEnum):
    """Where a row came from, one uint8 per id."""

    GPU = 0
    HOST = 1
    REMOTE = 2
    MISSING = 3
    """Not in any tier: the policy's row."""
    BAD_ID = 4
    """Outside the table: the policy's row."""
    UNAVAILABLE = 5
    """Its tier could not be asked: the policy's row."""
    PADDING = 6
    """The padding id: a row of zeros."""


_HOST = int(RowStatus.HOST)


@dataclass(frozen=True)
class ResolvedIds:
    """What ``resolve_ids`` found."""

    rows: NDArray
    """``[n]`` int64, within the table or ZERO_ROW."""
    status: NDArray
    """``[n]`` uint8, a RowStatus each."""
    bad: int
    """Ids outside the table."""
    rejected: int | None
    """Place of the first id that the policy rejects; then the rows mean nothing."""


def splitmix64(ids: NDArray, seed: int) -> NDArray:
    """int64 ids -> uint64 hashes."""
    z = (ids.astype(np.int64, copy=False).view(np.uint64) ^ np.uint64(seed)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fastrange(hashes: NDArray, rows: int) -> NDArray:
    """uint64 hashes -> int64 in [0, rows): the high half of the 128-bit product (Lemire, TOMACS 2019)."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    h0, h1 = hashes & low, hashes >> half
    n0, n1 = np.uint64(rows & 0xFFFFFFFF), np.uint64(rows >> 32)
    middle = h1 * n0 + ((h0 * n0) >> half)
    carry = h0 * n1 + (middle & low)
    return (h1 * n1 + (middle >> half) + (carry >> half)).astype(np.int64)


def resolve_ids(
    ids: NDArray, rule: IdRule, rows: int, row_of_id: NDArray | None, policy: Policy, padding_id: int | None
) -> ResolvedIds:
    """Ids ``[n]`` -> rows of a table of ``rows`` rows. ``row_of_id`` belongs to the rule's permutation."""
    ids = ids.astype(np.int64, copy=False)
    is_plain = rule.hash == "none" and row_of_id is None and (padding_id is None or padding_id < 0)
    # One pass: as unsigned numbers, negative ids are the largest.
    if is_plain and len(ids) and int(np.maximum.reduce(ids.view(np.uint64))) < rows:
        status = np.empty(len(ids), np.uint8)
        status.fill(_HOST)
        return ResolvedIds(ids, status, 0, None)
    padding = np.zeros(len(ids), bool) if padding_id is None else ids == padding_id
    row = _hashed(ids, rule, rows, row_of_id)
    is_bad = (row == ZERO_ROW) & ~padding
    bad = int(is_bad.sum())
    if bad:
        if policy == "reject" or (not rows and policy in ("clamp", "row0")):
            return ResolvedIds(row, np.zeros(0, np.uint8), bad, int(is_bad.argmax()))
        row = np.where(is_bad, _policy_row(ids, rule, rows, row_of_id, policy), row)
    status = np.where(padding, RowStatus.PADDING, np.where(is_bad, RowStatus.BAD_ID, RowStatus.HOST))
    return ResolvedIds(np.where(padding, ZERO_ROW, row), status.astype(np.uint8), bad, None)


def _hashed(ids: NDArray, rule: IdRule, rows: int, row_of_id: NDArray | None) -> NDArray:
    """The row of each id; ZERO_ROW for a bad one."""
    if rule.hash == "splitmix64":
        return fastrange(splitmix64(ids, rule.seed), rows) if rows else np.full(len(ids), ZERO_ROW)
    if row_of_id is None:
        return np.where((ids >= 0) & (ids < rows), ids, ZERO_ROW)
    inside = (ids >= 0) & (ids < len(row_of_id))
    row = np.full(len(ids), ZERO_ROW)
    row[inside] = row_of_id[ids[inside]]
    return np.where(row < rows, row, ZERO_ROW)


def _policy_row(ids: NDArray, rule: IdRule, rows: int, row_of_id: NDArray | None, policy: Policy) -> NDArray | int:
    """What stands in for each bad id."""
    if policy == "clamp":
        last = (rows if row_of_id is None else len(row_of_id)) - 1
        near = _hashed(np.clip(ids, 0, last), rule, rows, row_of_id)
        return np.where(near == ZERO_ROW, rows - 1, near)
    if policy == "row0":
        return 0
    if policy == "default_row" and rule.default_row is not None:
        return rule.default_row
    return ZERO_ROW


def apply_policy(
    ids: NDArray,
    features: Sequence[str],
    tables: Sequence[TableConfig],
    *,
    policy: Policy,
    padding_id: int | None,
    what: str,
    default_rows: Sequence[int | None] = (),
) -> NDArray:
    """Ids ``[n, features]`` that a graph may look up: it answers a zero row for an id outside its table.

    tables: of each feature; they are part of the graph, so their ids are rows. default_rows: what stands in for a bad
    id under the policy ``default_row``, per feature; None: a zero row. padding_id passes under every policy.
    Raises InputError naming tensor, feature, position and value under ``reject``, and under ``clamp`` and ``row0``
    where a table has no rows.
    """
    if policy == "zero":
        return ids
    last = np.asarray([table.rows - 1 for table in tables], dtype=np.int64)
    padding = np.zeros(ids.shape, dtype=bool) if padding_id is None else ids == padding_id
    bad = ((ids < 0) | (ids > last)) & ~padding
    if policy == "default_row":
        stand_in = [ZERO_ROW if row is None else row for row in default_rows or [None] * len(tables)]
        return np.where(bad, np.asarray(stand_in, dtype=np.int64), ids)
    rejected = bad if policy == "reject" else bad & (last < 0)
    if rejected.any():
        row, column = (int(i) for i in np.argwhere(rejected)[0])
        table = tables[column]
        raise InputError(
            f"tensor {what!r} (feature {features[column]!r}) holds {ids[row, column]} at [{row}, {column}]; "
            f"{range_text(table.name, table.rows)}"
        )
    return np.where(bad, np.clip(ids, 0, last) if policy == "clamp" else 0, ids)


def range_text(table: str, rows: int) -> str:
    """The ids of a table, for messages."""
    return (
        f"table {table!r} has {rows} rows, so its ids go from 0 to {rows - 1}"
        if rows
        else f"table {table!r} has no rows"
    )
