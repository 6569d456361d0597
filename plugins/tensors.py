"""What every caller of the kernels asks of tensors and their GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def address(tensor: Tensor | None) -> int | None:
    """Of the first element, as the params structs take it; None, a null pointer, for a tensor that is not given."""
    return None if tensor is None else tensor.data_ptr()


def type_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> ``float16``: the names of DATA_TYPES and TABLE_TYPES (library.py)."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
