// SPDX-License-Identifier: Apache-2.0
// The host tier's lookup: ids -> rows, from the shards of one table.
#pragma once

#include <cstdint>

#include "convert_rows.h"
#include "ids.h"

namespace hstu_trt {

struct ShardRows {
  void const* values;   // [rows, dim]
  float const* scales;  // [rows] of quantised rows
  int64_t first_row;
};

// Mirrored in tables/native.py. Strides are in bytes.
struct GatherParams {
  ShardRows const* shards;  // [shard_count], rising; the first begins with row 0
  int64_t shard_count;
  int64_t dim;
  IdRule rule;
  void const* ids;  // [count] int64, or int32 if ids_are_32_bit
  int64_t id_stride;
  int64_t count;
  void* out;  // [count, dim]; dim is contiguous
  int64_t out_stride;
  uint8_t* status;  // [count] RowStatus
  int64_t status_stride;
  RowType type;
  RowType out_type;
  int32_t ids_are_32_bit;
  int32_t threads;
  int32_t portable;  // do without the CPU's vector instructions
  int32_t reserved;
};

struct GatherResult {
  int64_t bad;       // ids outside of the table
  int64_t rejected;  // place of the first id that the policy rejects, or -1; then out and status mean nothing
};

// Returns false if no conversion to out_type exists.
bool gather(GatherParams const& params, GatherResult* result);

}  // namespace hstu_trt
