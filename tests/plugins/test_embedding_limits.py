"""What lookups the kernel refuses, in which words. No GPU is needed to ask."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hstu_trt.plugins.library import (
    DATA_TYPES,
    ROOT,
    TABLE_TYPES,
    EmbeddingColumns,
    EmbeddingParams,
    EmbeddingTable,
    KernelLibrary,
)

SOURCE = ROOT / "plugins/csrc/kernels/embedding/embedding.cu"
ADDRESS = 1 << 20


def valid_lookup(**changes: Any) -> EmbeddingParams:
    """A lookup that can be done, on addresses that nobody reads, with changes of the call, its columns or the table."""
    half = DATA_TYPES["float16"]
    params = EmbeddingParams(out=ADDRESS, out_stride=8, count=6, policy=1, output_type=half, column_count=1)
    params.columns[0] = EmbeddingColumns(
        ids=ADDRESS, id_stride=1, dim=8, type=half,
        table=EmbeddingTable(hot=ADDRESS, scales=ADDRESS, rows=10, hot_rows=10, default_row=-1),
    )  # fmt: skip
    columns = params.columns[0]
    for name, value in changes.items():
        home = next(one for one in (params, columns, columns.table) if hasattr(one, name))
        setattr(home, name, value)
    return params


INT8 = TABLE_TYPES["int8"]
REFUSED_LOOKUPS: list[dict[str, Any]] = [
    {"count": -1},
    {"count": 2**31},
    {"column_count": 0},
    {"column_count": 9},
    {"output_type": DATA_TYPES["float8_e4m3fn"]},
    {"policy": 5},
    {"lengths": ADDRESS, "padded_length": 4},
    {"lengths": ADDRESS, "padded_length": 0},
    {"latch": ADDRESS},
    {"out": None},
    {"ids": None},
    {"dim": 0},
    {"first": 1},
    {"type": 5},
    {"rows": -1},
    {"cold_rows": -1},
    {"hot": None},
    {"cold_rows": 1},
    {"direct_rows": 11},
    {"direct_rows": -1},
    {"type": INT8, "scales": None},
    {"hash": 3},
    {"hash": 2, "id_count": 4},
    {"default_row": -2},
    {"overlay_slots": ADDRESS, "overlay_mask": 2, "overlay": ADDRESS},
    {"overlay_slots": ADDRESS, "overlay_mask": 3},
    {"overlay_slots": ADDRESS, "overlay_mask": 3, "overlay": ADDRESS, "type": INT8},
]


def test_lookups_that_cannot_be_done(library: KernelLibrary) -> None:
    said = [library.embedding_unsupported(valid_lookup(**changes)) for changes in REFUSED_LOOKUPS]
    assert all(sentence and re.fullmatch(r"[ -~]{15,120}", sentence) for sentence in said), said
    assert set(said) == set(re.findall(r'return "([^"]+ [^"]+)";', SOURCE.read_text()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"count": 0, "ids": None, "out": None},
        {"hot": None, "rows": 0, "hot_rows": 0},
        {"hot": None, "live_tables": ADDRESS, "latch": ADDRESS},
        {"type": DATA_TYPES["bfloat16"], "output_type": DATA_TYPES["float32"], "dim": 7},
        {"type": INT8, "output_type": DATA_TYPES["bfloat16"], "cold": ADDRESS, "cold_rows": 5},
        {"hash": 2, "id_count": 4, "row_of_id": ADDRESS, "policy": 4, "default_row": 3},
        {"lengths": ADDRESS, "padded_length": 3},
        {"overlay_slots": ADDRESS, "overlay_mask": 3, "overlay": ADDRESS},
    ],
)
def test_lookups_that_can_be_done(library: KernelLibrary, changes: dict[str, Any]) -> None:
    assert library.embedding_unsupported(valid_lookup(**changes)) is None
