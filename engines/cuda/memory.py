"""Too little memory on the GPU, as an error that a server can answer with."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hstu_trt.contract.errors import DeviceMemoryError

# What lacks memory besides PyTorch's allocator: contexts, graphs and kernels that the driver loads at their first call,
# cuBLAS, and our own launchers.
_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
_GIB = 1 << 30


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Turns every error for want of memory into DeviceMemoryError, and gives what PyTorch holds in reserve back."""
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        # Its frames hold the tensors of what failed, which could not be given back.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise DeviceMemoryError(str(error).partition("\n")[0]) from None


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _WORDS)


def require_free(needed: int, device: torch.device) -> None:
    """Raises DeviceMemoryError where tables of so many bytes cannot be loaded; on a GPU only."""
    if device.type != "cuda":
        return
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        raise DeviceMemoryError(
            f"{device} has not even memory free for a CUDA context (nvidia-smi lists what holds it), and the tables "
            f"take {needed / _GIB:.2f} GiB"
        ) from None
    if needed > free:
        raise DeviceMemoryError(
            f"the tables take {needed / _GIB:.2f} GiB of GPU memory, and {free / _GIB:.2f} of the {total / _GIB:.2f} "
            f"GiB of {device} are free: end what else holds them (nvidia-smi lists it), or serve on another GPU"
        )
