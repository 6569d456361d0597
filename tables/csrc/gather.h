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

constexpr uint32_t kEmptySlot = 0xFFFFFFFFu;

// Rows that stand in front of the shards' ones. `slots` is a hash of `numbers` with open addressing, see index_rows.
struct OverlayRows {
  int64_t const* numbers;  // [count] row of the table
  uint32_t const* slots;   // [mask + 1] place in numbers, or kEmptySlot
  uint64_t mask;
  void const* values;   // [count, dim]
  float const* scales;  // [count] of quantised rows
};

// Mirrored in tables/native.py. Strides are in bytes.
struct GatherParams {
  ShardRows const* shards;     // [shard_count], rising; the first begins with row 0
  OverlayRows const* overlay;  // or nullptr; holds every row behind the last shard's
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

// Fills slots [capacity], a power of two above count, for the numbers [count], all different.
void index_rows(int64_t const* numbers, int64_t count, uint32_t* slots, int64_t capacity);

// Returns false if no conversion to out_type exists.
bool gather(GatherParams const& params, GatherResult* result);

}  // namespace hstu_trt
