"""Embedding lookup on a CUDA GPU: one launch on the current stream, nothing copied, nothing read on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.plugins.embedding_tables import DeviceTable, LiveTables
from hstu_trt.plugins.library import (
    MAX_COLUMNS,
    TABLE_TYPES,
    EmbeddingColumns,
    EmbeddingParams,
    UnsupportedError,
    load_library,
)
from hstu_trt.plugins.tensors import address, type_name

Policy = Literal["reject", "zero", "clamp", "row0", "default_row"]
_POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, kw_only=True)
class LookupOptions:
    """How a lookup answers."""

    policy: Policy = "zero"
    """What an id outside its table answers. ``reject``: zeros, as ``zero`` does, since nobody waits for the GPU; the
    status tells."""
    padding_id: int | None = None
    """This id answers zeros."""
    output_dtype: torch.dtype = torch.float32
    """float32, float16 or bfloat16."""


@dataclass(frozen=True, kw_only=True)
class LookupReport:
    """What a lookup tells besides rows; None: not asked for."""

    status: Tensor | None = None
    """``[n, tables]`` uint8 on the GPU: a RowStatus each (tables/csrc/ids.h)."""
    bad_ids: Tensor | None = None
    """``[tables]`` int64 on the GPU: ids outside of each table are added."""


def lookup(ids: Tensor, table: Tensor, output_dtype: torch.dtype) -> Tensor:
    """Rows of ``table`` [rows, dim] that ``ids`` [n] (int32 or int64) name -> [n, dim]; ids outside answer zeros.

    table: float32, float16 or bfloat16; output_dtype: float32 or float16. Raises InputError for tensors of a wrong
    shape or device, UnsupportedError for types that the kernel does not know.
    """
    if ids.dim() != 1 or table.dim() != 2 or ids.dtype not in {torch.int32, torch.int64}:
        shapes = f"{list(ids.shape)} {ids.dtype} and {list(table.shape)}"
        raise InputError(f"ids must be int32 or int64 [n] and the table [rows, dim]; they are {shapes}")
    tables = [DeviceTable(hot=table.contiguous())]
    return lookup_tables(ids[:, None], tables, LookupOptions(output_dtype=output_dtype))


def lookup_tables(
    ids: Tensor,
    tables: Sequence[DeviceTable] | LiveTables,
    options: LookupOptions = LookupOptions(),
    report: LookupReport = LookupReport(),
    *,
    out: Tensor | None = None,
    latch: Tensor | None = None,
) -> Tensor:
    """Rows of several tables side by side: ids ``[n, tables]`` -> ``[n, sum of dims]``.

    latch: ``[1]`` int64 on the GPU, for live tables that may be exchanged from another stream: this call then sees one
    version. Raises InputError and UnsupportedError.
    """
    live, versions = (tables, tables.tables) if isinstance(tables, LiveTables) else (None, tuple(tables))
    _check(ids, versions)
    if latch is not None and (latch.dtype != torch.int64 or latch.numel() != 1 or latch.device != ids.device):
        raise InputError(f"latch must be int64 [1] on {ids.device}, got {latch.dtype} {list(latch.shape)}")
    params, width = _params(ids, versions, options, report)
    if out is None:
        out = torch.empty((len(ids), width), dtype=options.output_dtype, device=ids.device)
    wanted = ((len(ids), width), options.output_dtype, ids.device)
    if (tuple(out.shape), out.dtype, out.device) != wanted or not out.is_contiguous():
        raise InputError(f"out must be contiguous, {[len(ids), width]} {options.output_dtype} on {ids.device}")
    params.out, params.out_stride = out.data_ptr(), width
    params.live_tables = None if live is None else live.word.data_ptr()
    params.latch = address(latch)
    _launch(params, ids.device)
    return out


def lookup_padded(ids: Tensor, lengths: Tensor, table: DeviceTable, options: LookupOptions = LookupOptions()) -> Tensor:
    """Padded sequences: ids ``[b, s]``, lengths ``[b]`` int32 -> ``[b, s, dim]``, zeros behind the ends."""
    wanted = (torch.int32, ids.shape[:1], ids.device)
    if (lengths.dtype, lengths.shape, lengths.device) != wanted or not lengths.is_contiguous():
        got = f"{lengths.dtype} {list(lengths.shape)}"
        raise InputError(f"lengths must be int32 [{len(ids)}] on {ids.device}, contiguous; got {got}")
    flat = ids.reshape(-1, 1)
    _check(flat, (table,))
    params, width = _params(flat, (table,), options, LookupReport())
    out = torch.empty((*ids.shape, width), dtype=options.output_dtype, device=ids.device)
    params.out, params.out_stride = out.data_ptr(), width
    params.lengths, params.padded_length = lengths.data_ptr(), ids.shape[1]
    _launch(params, ids.device)
    return out


def _check(ids: Tensor, tables: Sequence[DeviceTable]) -> None:
    if ids.dim() != 2 or ids.dtype not in {torch.int32, torch.int64} or ids.shape[1] != len(tables):
        raise InputError(f"ids must be int32 or int64 [n, {len(tables)}], got {ids.dtype} {list(ids.shape)}")
    for table in tables:
        if table.hot.device != ids.device:
            raise InputError(f"ids are on {ids.device}, and the table on {table.hot.device}")
    if not 1 <= len(tables) <= MAX_COLUMNS:
        raise UnsupportedError(f"embedding lookup: a call looks up in 1 to {MAX_COLUMNS} tables, not in {len(tables)}")


def _params(
    ids: Tensor, tables: Sequence[DeviceTable], options: LookupOptions, report: LookupReport
) -> tuple[EmbeddingParams, int]:
    """All but the output's address, and its width."""
    _check_report(ids, report)
    params = EmbeddingParams(
        count=len(ids), padding_id=options.padding_id or 0, policy=_POLICIES.index(options.policy),
        has_padding=options.padding_id is not None, output_type=_number(options.output_dtype),
        wide_ids=ids.dtype == torch.int64,
        column_count=len(tables),
    )  # fmt: skip
    first = 0
    status, bad_ids = report.status, report.bad_ids
    for number, table in enumerate(tables):
        params.columns[number] = EmbeddingColumns(
            ids=ids.data_ptr() + number * ids.stride(1) * ids.element_size(), id_stride=ids.stride(0),
            status=None if status is None else status.data_ptr() + number,
            status_stride=len(tables), bad_ids=None if bad_ids is None else bad_ids.data_ptr() + 8 * number,
            table=table.params(), live_table=number, dim=table.dim, first=first, type=_number(table.dtype),
        )  # fmt: skip
        first += table.dim
    return params, first


def _check_report(ids: Tensor, report: LookupReport) -> None:
    status, bad_ids = report.status, report.bad_ids
    if status is not None and (status.shape != ids.shape or status.dtype != torch.uint8 or not status.is_contiguous()):
        raise InputError(f"status must be contiguous uint8 {list(ids.shape)}, got {status.dtype} {list(status.shape)}")
    counted = bad_ids is None or (bad_ids.shape == ids.shape[1:] and bad_ids.dtype == torch.int64)
    if bad_ids is not None and not (counted and bad_ids.is_contiguous()):
        got = f"{bad_ids.dtype} {list(bad_ids.shape)}"
        raise InputError(f"bad_ids must be int64 {list(ids.shape[1:])}, contiguous; got {got}")
    for tensor in (status, bad_ids):
        if tensor is not None and tensor.device != ids.device:
            raise InputError(f"ids are on {ids.device}, and the report on {tensor.device}")


def _launch(params: EmbeddingParams, device: torch.device) -> None:
    library = load_library()
    if sentence := library.embedding_unsupported(params):
        raise UnsupportedError(f"embedding lookup: {sentence}")
    if device.type != "cuda":
        raise InputError(f"ids and tables are on {device}: this lookup runs on a CUDA GPU")
    with torch.cuda.device(device):
        library.launch_embedding_lookup(params, torch.cuda.current_stream(device).cuda_stream)


def _number(dtype: torch.dtype) -> int:
    name = type_name(dtype)
    if name not in TABLE_TYPES:
        raise UnsupportedError(f"embedding lookup: {name} is no type of these kernels")
    return TABLE_TYPES[name]
