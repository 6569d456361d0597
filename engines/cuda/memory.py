"""Too little memory on the GPU, as an error that a server can answer with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hstu_trt.contract.errors import DeviceMemoryError


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Turns PyTorch's error into DeviceMemoryError, and gives what PyTorch holds in reserve back to the device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise DeviceMemoryError(str(error).partition("\n")[0]) from None
