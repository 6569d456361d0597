// SPDX-License-Identifier: Apache-2.0
// Where a user's tokens stand and which keys a query sees. The rules are those of export/attention.py (valid_pairs).
#pragma once

#include "plan.h"

namespace hstu_trt {

inline __device__ UserShape user_shape(AttentionParams const& p, int user) {
  int const query_begin = p.query_offsets[user], prefix_begin = p.prefix_offsets[user];
  int const candidate_begin = p.candidate_offsets[user];
  int const cached_begin = p.cached_offsets ? p.cached_offsets[user] : 0;
  int const cached = p.cached_offsets ? p.cached_offsets[user + 1] - cached_begin : 0;
  UserShape s;
  s.cached = cached;
  s.prefix = cached + p.prefix_offsets[user + 1] - prefix_begin;
  s.candidates = p.candidate_offsets[user + 1] - candidate_begin;
  s.queries = p.query_offsets[user + 1] - query_begin;
  s.query_row = query_begin;
  s.query_candidate_row = p.query_offsets[p.users] + candidate_begin;
  s.key_row = prefix_begin;
  s.key_candidate_row = p.prefix_offsets[p.users] + candidate_begin;
  s.cached_row = cached_begin;
  return s;
}

// Both at 16-byte aligned places. Left to the compiler, an item is copied word by word.
inline __device__ void copy_item(WorkItem const* from, WorkItem* to) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(WorkItem) / sizeof(uint4)); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(from)[i];
  }
}

// Prefix positions [first, last] that a query sees; empty if first > last.
struct KeyRange {
  int first;
  int last;
};

// Causal masks leave every query one interval of the prefix. Positions count from the first non-contextual token
// (contextual tokens are 0, candidates stand at `end`): a query sees what comes before it, and itself.
struct MaskRules {
  int max_attn_len;
  int min_full_attn_seq_len;
  int contextual;  // contextual_seq_len - 1, at least 0
  bool has_contextual;

  __device__ explicit MaskRules(AttentionParams const& p)
      : max_attn_len(p.max_attn_len),
        min_full_attn_seq_len(p.min_full_attn_seq_len),
        contextual(p.contextual_seq_len > 0 ? p.contextual_seq_len - 1 : 0),
        has_contextual(p.contextual_seq_len > 0) {}

  // Keys of the prefix query at `position`, causal.
  __device__ KeyRange prefix_query(int position, int prefix) const {
    int const end = prefix - contextual;
    if (has_contextual && end <= 0) return {position, position};
    if (has_contextual && position <= contextual) return {0, prefix - 1};
    return {window_start(position - contextual, end), position};
  }

  // Keys of a candidate in the prefix.
  __device__ KeyRange candidate(int prefix) const {
    int const end = prefix - contextual;
    if (has_contextual && end <= 0) return {0, -1};
    return {window_start(end, end), prefix - 1};
  }

 private:
  __device__ int window_start(int id, int end) const {
    bool const full = max_attn_len == 0 || (min_full_attn_seq_len > 0 && id >= end - min_full_attn_seq_len);
    return full || id <= max_attn_len ? 0 : id - max_attn_len + contextual;
  }
};

}  // namespace hstu_trt
