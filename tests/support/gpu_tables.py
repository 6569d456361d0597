"""Tables of a folder on the GPU, and what the host tier answers for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.plugins.embedding_tables import DeviceTable
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.ids import Policy, RowStatus
from hstu_trt.tables.native import library_if_built
from hstu_trt.tables.quantisers import quantise_rows
from hstu_trt.tables.table_arrays import TableArrays, open_arrays

STORED = ("float32", "float16", "int8", "float8_e4m3fn")


def write_folder(folder: Path, tables: dict[str, tuple[NDArray, str]], rule: IdRule = IdRule()) -> Path:
    """Tables by name: float32 rows [n, dim] and the dtype they are stored in."""
    stored = []
    for name, (rows, dtype) in tables.items():
        config = TableConfig(name=name, rows=len(rows), dim=rows.shape[1], dtype="float32", features=(name,))
        given = quantise_rows(rows, dtype) if dtype in ("int8", "float8_e4m3fn") else rows.astype(dtype)
        plain = dataclasses.replace(rule, hash="none", row_of_id=None) if rule.hash == "permutation" else rule
        table = write_table(folder, config, [given], shard_bytes=4 << 10, dtype=dtype, ids=plain)
        stored.append(table)
    write_tables_manifest(folder, stored, "a test", {})
    return folder


def with_rule(arrays: TableArrays, rule: IdRule, row_of_id: NDArray | None) -> TableArrays:
    """The same rows under another rule."""
    return dataclasses.replace(
        arrays, table=dataclasses.replace(arrays.table, ids=rule), row_of_id=row_of_id
    )


def folder_arrays(folder: Path, name: str) -> TableArrays:
    return open_arrays(folder, HostTables.open(folder, native=False).tables[name])


def to_device(arrays: TableArrays, *, hot_rows: int | None = None) -> DeviceTable:
    """All rows, or the first ones, in GPU memory, the rest pinned."""
    table = arrays.table
    values = torch.from_numpy(np.concatenate([np.empty((0, table.dim), arrays.values[0].dtype), *arrays.values]))
    if table.dtype == "float8_e4m3fn":
        values = values.view(torch.float8_e4m3fn)
    scales = torch.from_numpy(np.concatenate(arrays.scales)).cuda() if arrays.scales else None
    permutation = arrays.row_of_id
    hot = len(values) if hot_rows is None else hot_rows
    return DeviceTable(
        hot=values[:hot].cuda(), cold=None if hot_rows is None else values[hot:].contiguous().pin_memory(),
        scales=scales, hash=table.ids.hash, seed=table.ids.seed, default_row=table.ids.default_row,
        row_of_id=None if permutation is None else torch.from_numpy(permutation.astype(np.int32)).cuda(),
    )  # fmt: skip


def host_answer(
    arrays: TableArrays, ids: NDArray, policy: Policy, padding_id: int | None, dtype: str
) -> tuple[NDArray, NDArray, int]:
    """Rows, status and number of bad ids: the library's where it is built, held against numpy's.

    A GPU cannot raise: under ``reject`` a bad id answers zeros, as under ``zero``.
    """
    from hstu_trt.tables.gather import NumpyGather
    from hstu_trt.tables.native import NativeGather

    library = library_if_built()
    gathers = [NumpyGather(arrays), *([] if library is None else [NativeGather(arrays, library, threads=1)])]
    answers = []
    for gather in gathers:
        out, status = np.empty((len(ids), arrays.table.dim), dtype), np.empty(len(ids), np.uint8)
        outcome = gather.lookup(ids, out, status, "zero" if policy == "reject" else policy, padding_id)
        assert outcome.rejected is None
        answers.append((out, status, outcome.bad))
    assert all(np.array_equal(bits(one[0]), bits(answers[0][0])) for one in answers)
    return answers[-1]


def bits(values: NDArray) -> NDArray:
    """Floats as integers: zeros of either sign differ, NaNs may be equal."""
    return values.view(f"u{values.itemsize}")


def same_bits(found: Tensor, expected: NDArray) -> bool:
    return np.array_equal(bits(found.cpu().numpy()), bits(expected))


def on_gpu(status: NDArray) -> NDArray:
    """What the host tier calls host rows is in GPU memory."""
    return np.where(status == RowStatus.HOST, RowStatus.GPU, status).astype(np.uint8)
