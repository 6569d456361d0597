// SPDX-License-Identifier: Apache-2.0
// What kernels that move 16 bytes at a time ask of tensors. Host code.
#pragma once

#include <cstdint>

#include "params.h"

namespace hstu_trt {

inline int element_bytes(DataType type) {
  return type == DataType::kFloat32 ? 4 : type == DataType::kFloat8E4M3 ? 1 : 2;
}

// Whether every row and head begins at a multiple of 16 bytes.
inline bool is_aligned(TokenTensor const& tensor, int element_bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.row_stride * element_bytes % 16 == 0 &&
         tensor.head_stride * element_bytes % 16 == 0;
}

}  // namespace hstu_trt
