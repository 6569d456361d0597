"""A stand-in for the CUDA driver: memory with bounds, on the host."""

import ctypes

import numpy as np

from hstu_trt.engines.cuda_driver import Device

H100 = Device(name="NVIDIA H100 80GB HBM3", compute_capability=90, memory_bytes=80 << 30, driver="580.1")
L40S = Device(name="NVIDIA L40S", compute_capability=89, memory_bytes=48 << 30, driver="580.1")


class FakeDriver:
    """Memory with bounds: every copy must lie within one live allocation."""

    def __init__(self, device=H100):
        self.facts, self.live, self.allocations, self.current = device, {}, 0, False
        self.synchronized = 0

    def device(self):
        return self.facts

    def use(self):
        self.current = True

    def release(self):
        self.current = False

    def allocate(self, size):
        assert self.current and size > 0
        buffer = np.full(size, 0xA5, np.uint8)
        self.live[buffer.ctypes.data] = buffer
        self.allocations += 1
        return buffer.ctypes.data

    allocate_host = allocate

    def free(self, pointer):
        del self.live[pointer]

    free_host = free

    def copy_to_device(self, device, host, size, stream):
        assert size <= self.live[device].nbytes and size <= self.live[host].nbytes and stream in self.live
        ctypes.memmove(device, host, size)

    def copy_to_host(self, host, device, size, stream):
        self.copy_to_device(host, device, size, stream)

    def create_stream(self):
        return self.allocate(1)

    def synchronize(self, stream):
        assert stream in self.live
        self.synchronized += 1

    def destroy_stream(self, stream):
        del self.live[stream]
