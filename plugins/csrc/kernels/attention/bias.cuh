// SPDX-License-Identifier: Apache-2.0
// Relative bias of the HSTU paper, from its position and time tables. The rules are those of export/attention.py.
#pragma once

#include "params.h"

namespace hstu_trt {

// trunc(ln(max(|dt|, 1)) / 0.301), at most `last`. logf and an IEEE division, not their fast forms: the bucket is then
// PyTorch's on a CPU for every difference below 11 million seconds. Beyond, the two logarithms round differently next
// to a bucket's edge, for one difference in a million.
inline __device__ int time_bucket(int64_t elapsed_seconds, int last) {
  int64_t const magnitude = elapsed_seconds < 0 ? -elapsed_seconds : elapsed_seconds;
  float const seconds = static_cast<float>(magnitude > 1 ? magnitude : 1);
  int const bucket = static_cast<int>(__fdiv_rn(logf(seconds), 0.301f));
  return bucket < last ? bucket : last;
}

// Bias of one pair. Positions count from the user's first token; candidates stand at position "prefix length".
inline __device__ float relative_bias(AttentionParams const& p, int query_position, int key_position,
                                      int64_t query_time, int64_t key_time) {
  int const last = p.position_bias_count - 1;
  int const index = last / 2 + key_position - query_position;
  float const by_position = __ldg(p.position_bias + (index < 0 ? 0 : index > last ? last : index));
  return by_position + __ldg(p.time_bias + time_bucket(query_time - key_time, p.time_bias_count - 1));
}

}  // namespace hstu_trt
