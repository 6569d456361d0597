"""FBGEMM's table-batched embedding without pooling, as a contender where its libraries can be loaded.

Of the wheel ``fbgemm-gpu`` seven libraries are enough: FBGEMM's own Python package is not imported. int8 rows are
FBGEMM's own kind, a scale and a bias in fp16 before 8-bit codes: other bits than ours, as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.plugins.embedding_tables import DeviceTable

NAME = "FBGEMM TBE nobag"
_LIBRARIES = ("asmjit", "fbgemm", "fbgemm_gpu_config", "fbgemm_gpu_tbe_utils", "fbgemm_gpu_tbe_common",
              "fbgemm_gpu_tbe_cache", "fbgemm_gpu_tbe_inference")  # fmt: skip
_FP16, _INT8 = 1, 2  # SparseType
_NO_POOLING = 2
_ROW_ALIGNMENT = 16
_HEADER_BYTES = 4


def load(folder: Path) -> None:
    """Loads the libraries of a folder. Raises ArtefactError, with the loader's words."""
    for name in _LIBRARIES:
        try:
            torch.ops.load_library(str(folder / f"{name}.so"))
        except OSError as error:
            raise ArtefactError(f"{folder / name}.so of fbgemm-gpu does not load here: {error}") from None


def contender(table: DeviceTable, ids: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """The lookup of each set of ids ``[n, 1]``, one id per bag; fp16 rows come out."""
    weights, kind = _weights(table)
    flat = [one[:, 0].to(torch.int32) for one in ids]
    device, dim = table.hot.device, table.dim
    bags = torch.arange(len(flat[0]) + 1, dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    placement, row_offset = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    kinds = torch.tensor([kind], dtype=torch.uint8, device=device)
    columns = torch.tensor([0, dim], dtype=torch.int32, device=device)
    cache, locations = nothing.view(0, 0), torch.empty(0, dtype=torch.int32, device=device)
    widths = (0, 0, dim if kind == _INT8 else 0, dim if kind == _FP16 else 0, 0)  # int2, int4, int8, fp16, fp32

    def call(turn: int) -> Tensor:
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            weights, nothing, placement, row_offset, kinds, columns, dim, *widths, flat[turn], bags, _NO_POOLING,
            None, _FP16, cache, locations, _ROW_ALIGNMENT, 0, -1, -1,
        )  # fmt: skip

    return call


def _weights(table: DeviceTable) -> tuple[Tensor, int]:
    """Rows as FBGEMM stores them, flat, and their SparseType."""
    if table.scales is None:
        return table.hot.view(torch.uint8).reshape(-1), _FP16
    row_bytes = -(-(_HEADER_BYTES + table.dim) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    rows = torch.zeros((len(table.hot), row_bytes), dtype=torch.uint8, device=table.hot.device)
    scales = table.scales.half()
    rows[:, :2] = scales[:, None].view(torch.uint8)
    rows[:, 2:4] = (scales * -128)[:, None].view(torch.uint8)
    rows[:, 4 : 4 + table.dim] = table.hot.view(torch.uint8) ^ 0x80
    return rows.reshape(-1), _INT8
