"""Embedding lookup on a CUDA GPU: one launch on the current stream, nothing copied, nothing read on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.plugins.library import DATA_TYPES, EmbeddingParams, EmbeddingTable, UnsupportedError, load_library


def lookup(ids: Tensor, table: Tensor, output_dtype: torch.dtype) -> Tensor:
    """Rows of ``table`` [rows, dim] that ``ids`` [n] (int32 or int64) name -> [n, dim]; ids outside answer zeros.

    table: float32, float16 or bfloat16; output_dtype: float32 or float16. Raises InputError for tensors of a wrong
    shape or device, UnsupportedError for types that the kernel does not know.
    """
    if ids.dim() != 1 or table.dim() != 2 or ids.dtype not in {torch.int32, torch.int64}:
        shapes = f"{list(ids.shape)} {ids.dtype} and {list(table.shape)}"
        raise InputError(f"ids must be int32 or int64 [n] and the table [rows, dim]; they are {shapes}")
    if ids.device != table.device:
        raise InputError(f"ids are on {ids.device}, and the table on {table.device}")
    ids, table = ids.contiguous(), table.contiguous()
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=output_dtype, device=table.device)
    params = EmbeddingParams(
        ids=ids.data_ptr(), out=out.data_ptr(), table=EmbeddingTable(table.data_ptr(), table.shape[0]),
        count=ids.shape[0], dim=table.shape[1], wide_ids=ids.dtype == torch.int64,
        type=_number(table.dtype), output_type=_number(output_dtype),
    )  # fmt: skip
    library = load_library()
    if sentence := library.embedding_unsupported(params):
        raise UnsupportedError(f"embedding lookup: {sentence}")
    with torch.cuda.device(table.device):
        library.launch_embedding_lookup(params, torch.cuda.current_stream(table.device).cuda_stream)
    return out


def _number(dtype: torch.dtype) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in DATA_TYPES:
        raise UnsupportedError(f"embedding lookup: {name} is no type of these kernels")
    return DATA_TYPES[name]
