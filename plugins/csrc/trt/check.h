// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace hstu_trt::trt {

// Throws std::runtime_error that says what failed, and clears CUDA's last error.
inline void check(cudaError_t error, std::string const& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

}  // namespace hstu_trt::trt
