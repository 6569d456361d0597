"""Tables of a folder on the GPU, and what the host tier answers for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from id_rules import IDS
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import write_vector
from hstu_trt.contract.stored_table import HashKind, IdRule
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.plugins.embedding_tables import DeviceTable
from hstu_trt.tables.gather import NumpyGather
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.ids import POLICIES, Policy, RowStatus, resolve_ids
from hstu_trt.tables.native import NativeGather, library_if_built
from hstu_trt.tables.quantisers import quantise_rows
from hstu_trt.tables.table_arrays import PERMUTATION_TENSOR, TableArrays, open_arrays

STORED = ("float32", "float16", "int8", "float8_e4m3fn")
HASHES: tuple[HashKind, ...] = ("none", "splitmix64", "permutation")
_SHARD_BYTES = 4 << 10


def write_folder(folder: Path, tables: dict[str, tuple[NDArray, str]], hashing: HashKind = "none") -> Path:
    """Tables by name, float32 rows [n, dim] and the dtype they are stored in, several shards each."""
    stored = []
    for name, (rows, dtype) in tables.items():
        config = TableConfig(name=name, rows=len(rows), dim=rows.shape[1], dtype="float32", features=(name,))
        quantised = dtype in ("int8", "float8_e4m3fn")
        given = quantise_rows(rows, dtype) if quantised else rows.astype(dtype)
        rule = _rule(folder, name, len(rows), hashing)
        stored.append(write_table(folder, config, [given], shard_bytes=_SHARD_BYTES, dtype=dtype, ids=rule))
    write_tables_manifest(folder, stored, "a test", {})
    return folder


def _rule(folder: Path, name: str, rows: int, hashing: HashKind) -> IdRule:
    if hashing == "splitmix64":
        return IdRule(hash=hashing, seed=2**64 - 3, default_row=2)
    if hashing == "none":
        return IdRule(default_row=2)
    (folder / name).mkdir(parents=True, exist_ok=True)
    permutation = np.random.default_rng(rows).permutation(rows).astype(np.uint32)
    write_vector(folder / name / "row_of_id.safetensors", PERMUTATION_TENSOR, permutation)
    return IdRule(hash=hashing, row_of_id=f"{name}/row_of_id.safetensors", default_row=2)


def with_rule(arrays: TableArrays, rule: IdRule, row_of_id: NDArray | None) -> TableArrays:
    """The same rows under another rule."""
    return dataclasses.replace(arrays, table=dataclasses.replace(arrays.table, ids=rule), row_of_id=row_of_id)


def folder_arrays(folder: Path, name: str) -> TableArrays:
    return open_arrays(folder, HostTables.open(folder, native=False).tables[name])


def to_device(arrays: TableArrays, *, hot_rows: int | None = None) -> DeviceTable:
    """All rows, or the first ones, in GPU memory, the rest pinned."""
    table, permutation = arrays.table, arrays.row_of_id
    values = torch.from_numpy(np.concatenate(arrays.values))
    if table.dtype == "float8_e4m3fn":
        values = values.view(torch.float8_e4m3fn)
    hot = len(values) if hot_rows is None else hot_rows
    return DeviceTable(
        hot=values[:hot].cuda(), cold=None if hot_rows is None else values[hot:].contiguous().pin_memory(),
        scales=torch.from_numpy(np.concatenate(arrays.scales)).cuda() if arrays.scales else None,
        hash=table.ids.hash, seed=table.ids.seed, default_row=table.ids.default_row,
        row_of_id=None if permutation is None else torch.from_numpy(permutation.astype(np.int32)).cuda(),
    )  # fmt: skip


def host_answer(
    arrays: TableArrays, ids: NDArray, policy: Policy, padding_id: int | None, dtype: str
) -> tuple[NDArray, NDArray, int]:
    """Rows, status and number of bad ids: numpy's, and the library's, which must be the same, where it is built.

    A GPU cannot raise: under ``reject`` a bad id answers zeros, as under ``zero``.
    """
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


def gpu_status(
    arrays: TableArrays, ids: NDArray, policy: Policy, padding_id: int | None, hot_rows: int | None = None
) -> NDArray:
    """The host tier's status, where rows from ``hot_rows`` on are the host's and the others the GPU's."""
    table = arrays.table
    found = resolve_ids(
        ids, table.ids, table.rows, arrays.row_of_id, "zero" if policy == "reject" else policy, padding_id
    )
    hot = found.rows < (table.rows if hot_rows is None else hot_rows)
    return np.where((found.status == RowStatus.HOST) & hot, RowStatus.GPU, found.status).astype(np.uint8)


def bits(values: NDArray) -> NDArray:
    """Floats as integers: zeros of either sign differ."""
    return values.view(f"u{values.itemsize}")


def same_bits(found: Tensor, expected: NDArray) -> bool:
    return np.array_equal(bits(found.cpu().numpy()), bits(expected))


def write_cases(folder: Path, rows: int = 97) -> int:
    """Lookups by name for the C++ host, with what the host tier answers; their number."""
    rng, lines = np.random.default_rng(3), []
    for hashing in HASHES:
        tables = {
            f"{dtype}.{dim}": (rng.standard_normal((rows, dim)).astype(np.float32), dtype)
            for dtype in STORED
            for dim in (20, 512)
        }
        write_folder(folder / hashing, tables, hashing)
        for name in tables:
            arrays = folder_arrays(folder / hashing, name)
            lines += [_write_case(folder, f"{hashing} {name}", arrays, number) for number in range(len(POLICIES))]
    (folder / "cases.txt").write_text("\n".join(lines) + "\n")
    return len(lines)


def _write_case(folder: Path, name: str, arrays: TableArrays, number: int) -> str:
    """The line of cases.txt for the policy of that number; padding, output type and tier go along with it."""
    policy, dim = POLICIES[number], arrays.table.dim
    padding_id, output, code = (-1, "float16", 10) if number % 2 else (None, "float32", 1)
    hot_rows = None if number % 3 == 0 else 31
    ids = np.concatenate([np.random.default_rng(number).integers(-4, arrays.table.rows + 4, 501), IDS])
    answer = host_answer(arrays, ids, policy, padding_id, output)[0]
    status = gpu_status(arrays, ids, policy, padding_id, hot_rows)
    stem = f"{name.replace(' ', '.')}.{policy}"
    for what, content in (("ids", ids), ("rows", answer), ("status", status)):
        content.tofile(folder / f"{stem}.{what}")
    flags = f"{'all' if hot_rows is None else hot_rows} {policy} {int(padding_id is not None)} -1 1 {code}"
    return f"{name} {flags} {len(ids)} {dim} {stem}.ids {stem}.rows {stem}.status"


def write_versions(folder: Path) -> Path:
    """Versions v1 and v2 of a table item_id [1000, 8] of ones and twos, a damaged one and one of another width."""
    for version, value, dim in (("v1", 1, 8), ("v2", 2, 8), ("damaged", 3, 8), ("wide", 4, 9)):
        write_folder(folder / version, {"item_id": (np.full((1000, dim), value, np.float32), "float32")})
    shard = sorted((folder / "damaged/item_id").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "CURRENT").write_text("v1\n")
    return folder
