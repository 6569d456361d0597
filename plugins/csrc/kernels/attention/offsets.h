// SPDX-License-Identifier: Apache-2.0
// Offsets from a caller whom nobody has checked: INT64 ones, or those that TensorRT makes up when it builds an engine.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace hstu_trt {

// The three offsets of a call: queries, prefixes, candidates. `to` holds as many, one behind the other.
struct OffsetsCopy {
  void const* from[3];  // [users + 1] int32, or int64 where `wide`
  bool wide[3];
  int32_t* to;  // [3, users + 1]
  int32_t users;
  int32_t query_rows;
  int32_t key_rows;
};

// Bytes of `to`.
constexpr size_t offsets_copy_size(int32_t users) { return 3 * sizeof(int32_t) * (static_cast<size_t>(users) + 1); }

// Copies offsets that name rows of the tensors: each begins at 0 and does not fall, no user has more queries than
// prefix rows, and their sums stay within query_rows and key_rows. If any does not, all copies become 0: no user has
// any rows. One small kernel; nothing read on the host.
cudaError_t launch_copy_offsets(OffsetsCopy const& copy, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
