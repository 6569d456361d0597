"""Memory of a runner: device buffers and pinned host buffers that grow and are used again."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hstu_trt.engines.cuda_driver import CudaDriver

_LEAST = 256
"""An empty tensor needs an address, too."""


@dataclass
class _Pair:
    device: int = 0
    device_size: int = 0
    host: int = 0
    host_size: int = 0


@dataclass
class DeviceBuffers:
    """A device buffer and a pinned host buffer per tensor."""

    driver: CudaDriver
    _pairs: dict[str, _Pair] = field(default_factory=dict)

    def device(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes on the GPU; what an earlier, smaller buffer held is lost."""
        pair, size = self._pairs.setdefault(name, _Pair()), max(size, _LEAST)
        if pair.device_size < size:
            if pair.device:
                self.driver.free(pair.device)
            pair.device, pair.device_size = 0, 0
            pair.device, pair.device_size = self.driver.allocate(size), size
        return pair.device

    def upload(self, name: str, array: NDArray, stream: int) -> int:
        """Enqueues a copy of an array to the GPU through pinned memory; returns where it will be."""
        staged = self._host(name, array.shape, array.dtype)
        np.copyto(staged, array)
        device = self.device(name, array.nbytes)
        if array.nbytes:
            self.driver.copy_to_device(device, staged.ctypes.data, array.nbytes, stream)
        return device

    def download(self, name: str, shape: tuple[int, ...], dtype: DTypeLike, stream: int) -> NDArray:
        """Enqueues a copy from the GPU; the array is valid after the stream was waited for, until the next call."""
        staged = self._host(name, shape, dtype)
        if staged.nbytes:
            self.driver.copy_to_host(staged.ctypes.data, self._pairs[name].device, staged.nbytes, stream)
        return staged

    def close(self) -> None:
        """Frees everything."""
        for pair in self._pairs.values():
            if pair.device:
                self.driver.free(pair.device)
            if pair.host:
                self.driver.free_host(pair.host)
        self._pairs.clear()

    def _host(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """A view of pinned memory with this shape and dtype."""
        kind: Any = np.dtype(dtype)
        pair, size = self._pairs.setdefault(name, _Pair()), max(int(np.prod(shape)) * kind.itemsize, _LEAST)
        if pair.host_size < size:
            if pair.host:
                self.driver.free_host(pair.host)
            pair.host, pair.host_size = 0, 0
            pair.host, pair.host_size = self.driver.allocate_host(size), size
        raw = (ctypes.c_uint8 * pair.host_size).from_address(pair.host)
        return np.ndarray(shape, kind, buffer=memoryview(raw))
