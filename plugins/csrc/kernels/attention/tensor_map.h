// SPDX-License-Identifier: Apache-2.0
// Tensor maps for the copy engine.
#pragma once

#include <cuda.h>

#include "params.h"

namespace hstu_trt {

// Boxes of box_rows x box_elements out of [outer, rows, row_elements]. Strides in elements; swizzled by box row bytes.
struct TensorMapShape {
  void const* data;
  DataType type;
  int row_elements;
  int rows;
  int outer;
  int64_t row_stride;
  int64_t outer_stride;
  int box_elements;
  int box_rows;
  int swizzle_bytes;
};

// False if the driver refuses. Host code only; reads no device memory.
bool encode_tensor_map(TensorMapShape const& shape, CUtensorMap& map) noexcept;

}  // namespace hstu_trt
