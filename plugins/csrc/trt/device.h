// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "../kernels/common/device.h"

namespace hstu_trt::trt {

// Compute capability of the current device, 90 for 9.0; of Hopper where there is none, as when an engine is only
// described.
inline int current_capability() noexcept {
  Device device;
  bool const is_there = current_device(device) == cudaSuccess;
  cudaGetLastError();
  return is_there ? device.capability : 90;
}

}  // namespace hstu_trt::trt
