"""The driver's face: errors on a stand-in, and memory, copies and streams on a real GPU."""

import ctypes
import types

import numpy as np
import pytest

from hstu_trt.bench.chain import open_runner
from hstu_trt.contract.errors import ConfigError, DeviceMemoryError, HstuTrtError
from hstu_trt.engines import cuda_driver
from hstu_trt.engines.cuda_driver import CudaDriver
from hstu_trt.engines.device_buffers import DeviceBuffers


def library(gpus=1, failing=None):
    """libcuda with so many GPUs, in which one function fails with error 2."""

    def count(pointer):
        pointer._obj.value = gpus
        return 0

    def text(status, pointer):
        pointer._obj.value = b"out of memory"
        return 0

    known = {"cuDeviceGetCount": count, "cuGetErrorString": text}

    class Library(types.SimpleNamespace):
        def __getattr__(self, name):
            return lambda *arguments: 2 if name == failing else known.get(name, lambda *_: 0)(*arguments)

    return Library()


def test_no_gpu_is_an_error():
    with pytest.raises(ConfigError, match="the CUDA driver sees no GPU"):
        CudaDriver(library(gpus=0))


def test_no_driver_is_an_error(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ConfigError, match=r"no CUDA GPU here: the driver's libcuda.so.1 cannot be loaded"):
        CudaDriver()


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet"])
def test_a_failing_call_is_named(function):
    with pytest.raises(HstuTrtError, match=f"{function} failed with error 2: out of memory"):
        CudaDriver(library(failing=function))


@pytest.mark.faults
@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuMemHostAlloc"])
def test_failing_memory_is_named(function):
    driver = CudaDriver(library(failing=function))
    allocate = driver.allocate if function == "cuMemAlloc_v2" else driver.allocate_host
    with pytest.raises(DeviceMemoryError, match=f"{function} failed with error 2"):
        allocate(1 << 40)


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt_rtx"])
def test_a_runner_without_a_gpu_or_a_module_says_so(kind, monkeypatch, model):
    def missing():
        raise ConfigError("no CUDA GPU here")

    monkeypatch.setattr(cuda_driver, "_load", missing)
    with pytest.raises(ConfigError, match=r"no CUDA GPU here|the Python module 'tensorrt' cannot be imported"):
        open_runner(kind, model, "hstu")


@pytest.mark.gpu
def test_a_real_gpu():
    driver = CudaDriver()
    device = driver.device()
    assert device.compute_capability >= 70
    assert device.memory_bytes > 1 << 30
    assert device.driver[0].isdigit()
    driver.use()
    buffers, stream = DeviceBuffers(driver), driver.create_stream()
    rng = np.random.default_rng(0)
    for rows in (3, 0, 1000, 7, 100_000):
        for dtype in ("float16", "float32", "int64", "int32"):
            array = rng.integers(0, 100, (rows, 5)).astype(dtype)
            address = buffers.upload("x", array, stream)
            assert address == buffers.device("x", array.nbytes)
            driver.synchronize(stream)
            buffers._host("x", array.shape, dtype)[:] = 0
            back = buffers.download("x", array.shape, dtype, stream)
            driver.synchronize(stream)
            np.testing.assert_array_equal(back, array)
    with pytest.raises(HstuTrtError, match="cuMemAlloc_v2 failed"):
        driver.allocate(1 << 50)
    buffers.close()
    driver.destroy_stream(stream)
    driver.release()
