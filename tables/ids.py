"""Id policies: what happens to an id outside its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model import TableConfig

Policy = Literal["reject", "clamp", "zero"]
POLICIES: tuple[Policy, ...] = ("reject", "clamp", "zero")


def apply_policy(
    ids: NDArray,
    features: Sequence[str],
    tables: Sequence[TableConfig],
    *,
    policy: Policy,
    padding_id: int | None,
    what: str,
) -> NDArray:
    """Ids ``[n, features]`` that a graph may look up: it answers a zero row for an id outside its table.

    tables: of each feature. padding_id passes under every policy.
    Raises InputError naming tensor, feature, position and value under ``reject``, and under ``clamp`` where a table
    has no rows.
    """
    if policy == "zero":
        return ids
    last = np.asarray([table.rows - 1 for table in tables], dtype=np.int64)
    padding = np.zeros(ids.shape, dtype=bool) if padding_id is None else ids == padding_id
    bad = ((ids < 0) | (ids > last)) & ~padding
    if policy == "clamp":
        bad &= last < 0
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        table = tables[column]
        raise InputError(
            f"tensor {what!r} (feature {features[column]!r}) holds {ids[row, column]} at [{row}, {column}]; "
            f"{range_text(table.name, table.rows)}"
        )
    return np.where(padding, ids, np.clip(ids, 0, last)) if policy == "clamp" else ids


def range_text(table: str, rows: int) -> str:
    """The ids of a table, for messages."""
    return (
        f"table {table!r} has {rows} rows, so its ids go from 0 to {rows - 1}"
        if rows
        else f"table {table!r} has no rows"
    )
