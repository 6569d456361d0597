// SPDX-License-Identifier: Apache-2.0
// What every attention kernel is called with: plain data, no torch, no TensorRT.
#pragma once

#include <cstdint>

#include "../common/data_type.h"

namespace hstu_trt {

// Packed tokens [rows, heads, dim]. dim is contiguous; strides are in elements.
struct TokenTensor {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// One call of HSTU attention on the split token layout. With query i and key j of one user:
//
//     out_i = scale_i * sum_j SiLU(alpha * q_i.k_j + bias_ij) * mask_ij * v_j      scale_i = 1 / N or attn_scale
//
// Rows of q and out: the last query_offsets[b+1] - query_offsets[b] prefix rows of each user b, then all candidates.
// Rows of k and v: the prefix rows that are not cached, user after user, then all candidates.
// A user's prefix is its cached tokens, then its rows in k and v. All pointers are device pointers; the host reads none
// of them, so a captured launch may be replayed with other lengths within the same bounds.
struct AttentionParams {
  TokenTensor q;    // [query_rows, heads, qk_dim]
  TokenTensor k;    // [key_rows, heads, qk_dim]
  TokenTensor v;    // [key_rows, heads, v_dim]; kFloat8E4M3 with packed_values: value blocks, see value_blocks.h
  TokenTensor out;  // [query_rows, heads, v_dim]

  // Keys and values of earlier tokens; data is nullptr without a cache. Contiguous: [cached_rows, heads, dim], rows by
  // cached_offsets. Paged: [pages * page_size, heads, dim], with cached_rows = pages * page_size.
  TokenTensor cached_k;
  TokenTensor cached_v;           // kFloat8E4M3: value blocks
  int32_t const* cached_offsets;  // [users + 1]: cached tokens per user
  int32_t const* page_table;      // [users, pages_per_user], or nullptr: contiguous

  int32_t const* query_offsets;      // [users + 1]
  int32_t const* prefix_offsets;     // [users + 1]
  int32_t const* candidate_offsets;  // [users + 1]

  float const* norm;        // [1] or [users]: N
  float const* attn_scale;  // [1] or [query_rows], replaces 1 / N; or nullptr

  // kFloat8E4M3: real value = stored value * scale. [1] or [heads].
  float const* q_scale;
  float const* k_scale;
  float const* v_scale;

  // Relative bias of the HSTU paper: position_bias[middle + j - i] + time_bias[bucket(query time - key time)].
  // All four are given, or none. Candidates stand at position "prefix length".
  float const* position_bias;       // [position_bias_count], 2P - 1 entries, middle = P - 1
  float const* time_bias;           // [time_bias_count], buckets + 1 entries
  int64_t const* query_timestamps;  // [query_rows] seconds, of the token after the query
  int64_t const* key_timestamps;    // [key_rows] seconds

  void* workspace;  // attention_workspace_size() bytes, 256-byte aligned

  int32_t users;
  int32_t heads;
  int32_t qk_dim;
  int32_t v_dim;
  int32_t query_rows;   // rows of q and out: a bound, query_offsets and candidate_offsets tell how many are in use
  int32_t key_rows;     // rows of k and v, likewise
  int32_t cached_rows;  // rows of cached_k and cached_v
  int32_t page_size;    // tokens per page
  int32_t pages_per_user;
  int32_t norm_count;        // 1 or users
  int32_t attn_scale_count;  // 1 or query_rows; 0 without attn_scale
  int32_t scale_count;       // 1 or heads; 0 unless kFloat8E4M3
  int32_t position_bias_count;
  int32_t time_bias_count;

  DataType type;         // of q, k, v and the cache
  DataType output_type;  // of out: kFloat16, kBFloat16 or kFloat32

  float alpha;
  int32_t causal;                 // 0: a token also sees later tokens of its user
  int32_t max_attn_len;           // window in tokens; 0: none
  int32_t contextual_seq_len;     // leading prefix tokens that see the whole prefix
  int32_t min_full_attn_seq_len;  // newest tokens exempt from the window
  int32_t candidate_group_size;   // a candidate sees earlier candidates of its group; 1: itself only
  int32_t packed_values;          // kFloat8E4M3: v comes as value blocks
  int32_t reuse_plan;             // the workspace holds the plan of an earlier call with the same offsets and options
  int32_t whole_items;            // never cut along the keys: a user's bits then do not depend on who shares the batch
};

}  // namespace hstu_trt
