"""CUDA memory, streams and device facts through the driver library, by ctypes.

Why not a package: libcuda.so.1 comes with the GPU driver, so it is there wherever an engine can run and never
mismatches it. cuda-python and a CUDA runtime library would be one more thing to install in the right version, and
Polygraphy's wrapper has no pinned host memory. The primary context is the one that TensorRT uses.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

from hstu_trt.contract.errors import ConfigError, DeviceMemoryError, HstuTrtError

_LIBRARY, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NON_BLOCKING = 1
_OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU at hand."""

    name: str
    compute_capability: int
    """Ten times it, as in 90 for 9.0."""
    memory_bytes: int
    driver: str
    """Version of the GPU driver; "unknown" where NVML does not say."""


class CudaDriver:
    """The first visible GPU. Raises ConfigError when there is none. Pointers are integers."""

    def __init__(self, library: Any = None) -> None:
        self._cuda = library or _load()
        self._call("cuInit", c_uint(0))
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if count.value < 1:
            raise ConfigError("the CUDA driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)")
        self._device = c_int()
        self._call("cuDeviceGet", byref(self._device), c_int(0))
        self._context = c_void_p()

    def device(self) -> Device:
        """Facts about the GPU."""
        name, total = ctypes.create_string_buffer(256), c_size_t()
        self._call("cuDeviceGetName", name, c_int(256), self._device)
        self._call("cuDeviceTotalMem_v2", byref(total), self._device)
        major, minor = self._attribute(_MAJOR), self._attribute(_MINOR)
        return Device(
            name=name.value.decode(),
            compute_capability=10 * major + minor,
            memory_bytes=total.value,
            driver=_driver_version(),
        )

    def use(self) -> None:
        """Makes the GPU's primary context current in this thread; retains it at the first call."""
        if not self._context:
            self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)

    def release(self) -> None:
        """Gives the primary context back."""
        if self._context:
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)
            self._context = c_void_p()

    def allocate(self, size: int) -> int:
        """Device memory of ``size`` bytes."""
        pointer = c_void_p()
        self._call("cuMemAlloc_v2", byref(pointer), c_size_t(size))
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", c_void_p(pointer))

    def allocate_host(self, size: int) -> int:
        """Pinned host memory of ``size`` bytes, which copies reach without a detour."""
        pointer = c_void_p()
        self._call("cuMemHostAlloc", byref(pointer), c_size_t(size), c_uint(0))
        return pointer.value or 0

    def free_host(self, pointer: int) -> None:
        self._call("cuMemFreeHost", c_void_p(pointer))

    def copy_to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Enqueues a copy of ``size`` bytes."""
        self._call("cuMemcpyHtoDAsync_v2", c_void_p(device), c_void_p(host), c_size_t(size), c_void_p(stream))

    def copy_to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Enqueues a copy of ``size`` bytes."""
        self._call("cuMemcpyDtoHAsync_v2", c_void_p(host), c_void_p(device), c_size_t(size), c_void_p(stream))

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        """Waits for everything on a stream."""
        self._call("cuStreamSynchronize", c_void_p(stream))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", c_void_p(stream))

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status:
            text = c_char_p()
            self._cuda.cuGetErrorString(c_int(status), byref(text))
            said = text.value.decode() if text.value else "no description"
            kind = DeviceMemoryError if status == _OUT_OF_MEMORY else HstuTrtError
            raise kind(f"CUDA driver: {function} failed with error {status}: {said}")


def current_device() -> Device:
    """The GPU at hand. Raises ConfigError when there is none."""
    return CudaDriver().device()


def _load() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ConfigError(f"no CUDA GPU here: the driver's {_LIBRARY} cannot be loaded ({error})") from None


def _driver_version() -> str:
    try:
        nvml, text = ctypes.CDLL(_NVML), ctypes.create_string_buffer(80)
    except OSError:
        return "unknown"
    known = nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, c_uint(len(text))) == 0
    return text.value.decode() if known else "unknown"
