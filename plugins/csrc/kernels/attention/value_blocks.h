// SPDX-License-Identifier: Apache-2.0
// Value blocks: fp8 values as the tensor cores want them.
//
// An fp8 matrix product reads both operands along the summed axis, and PV sums over keys, so values are stored
// transposed: blocks of 128 keys, [block, heads, v_dim, 128]. Within each 16 keys the order is that of the score
// fragment, so that SiLU(S) becomes the next product's operand without a shuffle: slot 4t + i holds key 2t + i for
// i < 2 and key 8 + 2t + i - 2 for i >= 2 (t = 0..3). Unused slots of a block hold zeros.
//
// The rows of `tokens` consecutive tokens at row r of user b begin at block r / 128 + b: no two users share a block.
// Values of one call: prefixes first, blocks [0, key_rows / 128 + users), then candidates, in as many blocks again.
// A page of a paged cache is one block (page_size 128).
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt {

constexpr int kValueBlockKeys = 128;

// First block of a user whose rows begin at `row`.
constexpr __host__ __device__ int first_value_block(int row, int user) { return row / kValueBlockKeys + user; }

// Blocks of one section (prefixes, candidates or a contiguous cache) of `rows` rows.
constexpr __host__ __device__ int value_blocks(int rows, int users) { return rows / kValueBlockKeys + users; }

// Packs v [key_rows, heads, v_dim] of `params` into `blocks` [2 * value_blocks(key_rows, users), heads, v_dim, 128].
// Candidate rows count from 0 in their section.
// `behind_plan`: the launch before it on the stream is launch_plan's; the two then run side by side
// (compute capability 9.0 and up).
cudaError_t launch_pack_values(AttentionParams const& params, void* blocks, bool behind_plan,
                               cudaStream_t stream) noexcept;

}  // namespace hstu_trt
