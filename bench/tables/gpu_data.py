"""Tables, ids and output buffers of the GPU lookup benchmark."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.bench.workloads.popularity import zipf_ranks
from hstu_trt.plugins.embedding_tables import DeviceTable

_BLOCK_BYTES = 64 << 20
_SEED = 20261122
DTYPES = {"fp16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, kw_only=True)
class GatherCase:
    """Lookups of fp16 rows in one table in GPU memory."""

    dtype: str
    dim: int
    lookups: int
    table_bytes: int

    @property
    def rows(self) -> int:
        return self.table_bytes // (self.dim * DTYPES[self.dtype].itemsize)

    @property
    def name(self) -> str:
        """As in ``int8 9048 of 8388608 x 512``."""
        return f"{self.dtype} {self.lookups} of {self.rows} x {self.dim}"

    @property
    def read_bytes(self) -> int:
        """Least bytes that a lookup must read: rows, scales, ids."""
        return self.lookups * (self.dim * DTYPES[self.dtype].itemsize + 8 + (0 if self.dtype == "fp16" else 4))

    @property
    def moved_bytes(self) -> int:
        """Those, and the output."""
        return self.read_bytes + self.lookups * self.dim * 2


def device_table(dtype: str, rows: int, dim: int) -> DeviceTable:
    """Random rows, in GPU memory."""
    generator = torch.Generator("cuda").manual_seed(_SEED)
    if dtype == "fp16":
        return DeviceTable(
            hot=torch.empty((rows, dim), dtype=torch.float16, device="cuda").normal_(generator=generator)
        )
    scales = torch.rand(rows, device="cuda", generator=generator) + 0.5
    values = torch.empty((rows, dim), dtype=torch.int8, device="cuda").random_(-127, 128, generator=generator)
    if dtype == "fp8":
        values = values.masked_fill_(values == 127, 0).masked_fill_(values == -1, 0)  # no NaN
    return DeviceTable(hot=values.view(DTYPES[dtype]), scales=scales)


def random_ids(count: int, rows: int, sets: int, *, exponent: float = 0.0) -> list[Tensor]:
    """Sets of ids [count, 1] on the GPU: uniform, or ranks of a Zipf law, 0 the most popular."""
    rng = np.random.default_rng(_SEED)
    draws = [zipf_ranks(rng.random(count), rows=rows, exponent=exponent) for _ in range(sets)]
    return [torch.from_numpy(draw[:, None]).cuda() for draw in draws]


@dataclass
class HostRows:
    """fp16 rows in pinned memory of huge pages, every page touched."""

    rows: Tensor
    """``[rows, dim]`` float16; the first 8 bytes of a row are its number."""
    memory: mmap.mmap
    array: NDArray

    @classmethod
    def make(cls, rows: int, dim: int, threads: int = 16) -> HostRows:
        """rows: a multiple of 64 MiB of them at best."""
        row_bytes = 2 * dim
        memory = mmap.mmap(-1, rows * row_bytes)
        memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, np.uint8).reshape(rows, row_bytes)
        step = max(1, _BLOCK_BYTES // row_bytes)
        # Any bits but those of NaN and infinity.
        block = np.random.default_rng(_SEED).integers(0, 0x7800, (step, dim), np.uint16).view(np.uint8)

        def fill(first: int) -> None:
            here = array[first : first + step]
            here[:] = block[: len(here)]
            here[:, :8] = np.arange(first, first + len(here), dtype=np.int64)[:, None].view(np.uint8)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, rows, step)))
        tensor = torch.from_numpy(array.view(np.float16))
        error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if error:
            raise MemoryError(f"{tensor.nbytes} bytes cannot be pinned: CUDA error {error}")
        return cls(tensor, memory, array)

    def release(self) -> None:
        """Unpins; nothing may read the rows any more."""
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self.rows.data_ptr())


def outputs(count: int, width: int, sets: int) -> list[Tensor]:
    """fp16 buffers on the GPU."""
    return [torch.empty((count, width), dtype=torch.float16, device="cuda") for _ in range(sets)]


def differing_rows(expected: Tensor, found: Tensor) -> float:
    """Rows of which a bit differs."""
    return float((expected.view(torch.int16) != found.view(torch.int16)).any(dim=1).sum())
