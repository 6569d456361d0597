// SPDX-License-Identifier: Apache-2.0
// What the embedding lookup is called with: plain data, no torch, no TensorRT.
#pragma once

#include <cstdint>

#include "../common/data_type.h"

namespace hstu_trt {

// A table in device memory: [rows, dim], contiguous.
struct EmbeddingTable {
  void const* data;
  int64_t rows;
};

// out[i] = table[ids[i]], or zeros where ids[i] is not in [0, rows).
struct EmbeddingParams {
  void const* ids;  // [count] int32, or int64 with wide_ids
  void* out;        // [count, dim], contiguous

  EmbeddingTable table;
  // Device memory, or nullptr. If given, the kernel reads it instead of `table`, so that a captured launch sees a table
  // that was exchanged meanwhile. Its data is 16-byte aligned; dim and type stay.
  EmbeddingTable const* live_table;

  int64_t count;
  int32_t dim;
  DataType type;         // of the table: kFloat32, kFloat16 or kBFloat16
  DataType output_type;  // kFloat32 or kFloat16
  int32_t wide_ids;
};

}  // namespace hstu_trt
