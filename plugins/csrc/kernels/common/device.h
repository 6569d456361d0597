// SPDX-License-Identifier: Apache-2.0
// The GPU that a launch goes to.
#pragma once

#include <cuda_runtime_api.h>

namespace hstu_trt {

struct Device {
  int capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
};

inline cudaError_t current_device(Device& device) {
  int id = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  device.capability = 10 * major + minor;
  return error;
}

}  // namespace hstu_trt
