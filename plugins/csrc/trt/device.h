// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

namespace hstu_trt::trt {

// Compute capability of the current device, 90 for 9.0; of Hopper where there is none, as when an engine is only
// described.
inline int current_capability() noexcept {
  int device = 0, major = 9, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  cudaGetLastError();
  return 10 * major + minor;
}

}  // namespace hstu_trt::trt
