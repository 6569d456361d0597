// SPDX-License-Identifier: Apache-2.0
// The token stream, and the first layer's norm of it, in one pass over the content product.
#include "layer.h"
#include "rows.cuh"

namespace hstu_trt {
namespace {

constexpr float kSecondsPerUnit = 60.0f;
constexpr float kLeastElapsed = 1e-6f;

// Where a token stands in the split layout.
struct Place {
  int user;
  int local;   // among the user's prefix, or candidates
  int length;  // of the user's prefix
  bool candidate;
};

// The user whose rows hold `row`: the last one that begins at or before it and is not empty.
__device__ int user_of(int32_t const* offsets, int users, int row) {
  int low = 0, high = users;
  while (low + 1 < high) {
    int const middle = (low + high) / 2;
    if (__ldg(offsets + middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ Place place_of(EncodeTokensParams const& p, int token) {
  bool const candidate = token >= p.prefix_tokens;
  int const row = candidate ? token - p.prefix_tokens : token;
  int32_t const* const offsets = candidate ? p.candidate_offsets : p.prefix_offsets;
  int const user = user_of(offsets, p.users, row);
  int const length = __ldg(p.prefix_offsets + user + 1) - __ldg(p.prefix_offsets + user);
  return {user, row - __ldg(offsets + user), length, candidate};
}

__device__ int position_of(EncodeTokensParams const& p, Place const& place) {
  int position = p.slots;
  if (!place.candidate) {
    position = place.local < p.slots ? place.local : place.length - place.local + p.slots;
  }
  return min(max(position, 0), p.last_position);
}

__device__ int bucket_of(EncodeTokensParams const& p, Place const& place, int token) {
  int const last = max(__ldg(p.candidate_offsets + place.user + 1) - 1, 0);
  // A batch without candidates has no such row.
  int64_t const newest = p.timestamps[min(p.prefix_tokens + last, p.tokens - 1)];
  int64_t const elapsed = newest - p.timestamps[token];
  float const minutes = fmaxf(static_cast<float>(elapsed), kLeastElapsed) / kSecondsPerUnit;
  return static_cast<int>(fminf(sqrtf(minutes), static_cast<float>(p.last_bucket)));
}

// The row of the actions' table: bit i is set if the token has any action of mask i; candidates have a row of their
// own.
__device__ int64_t action_row(EncodeTokensParams const& p, Place const& place, int token) {
  int row = 1 << p.action_count;
  if (!place.candidate) {
    int64_t const actions = p.actions[token];
    row = 0;
    for (int i = 0; i < p.action_count; ++i) row |= static_cast<int>((actions & p.action_masks[i]) > 0) << i;
  }
  return row;
}

template <int kVectors>
__device__ void add_row(Row<kVectors>& x, void const* rows, int64_t row, int width) {
  Row<kVectors> other;
  other.load(half_row(rows, row, width), width);
  x.add(other);
}

template <int kVectors>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) encode_tokens(EncodeTokensParams const p) {
  int const token = row_of_warp();
  if (token >= p.tokens) return;
  Place const place = place_of(p, token);
  Row<kVectors> x;
  if (!place.candidate && place.local < p.slots) {
    x.load(half_row(p.contextual, static_cast<int64_t>(place.user) * p.slots + place.local, p.width), p.width);
  } else {
    x.load(half_row(p.content, token, p.width), p.width);
    x.layer_norm(p.gain, p.bias, p.width, p.eps);
    if (p.extra.rows) {
      int64_t row = p.extra.index ? p.extra.index[token] : token;
      if (p.extra.index && (row < 0 || row > p.extra.count)) row = p.extra.count;
      add_row(x, p.extra.rows, row, p.width);
    }
    if (p.actions_table) add_row(x, p.actions_table, action_row(p, place, token), p.width);
  }
  float const scale = sqrtf(static_cast<float>(p.width));
  x.combine(x, [=](float value, float) { return value * scale; });
  add_row(x, p.position_table, position_of(p, place), p.width);
  add_row(x, p.time_table, bucket_of(p, place, token), p.width);
  x.round_to_half();
  x.store_half(half_row(p.x, token, p.width), p.width);
  x.layer_norm(p.norm_gain, p.norm_bias, p.width, p.norm_eps);
  x.store(p.normed, token, 0, p.width);
}

}  // namespace

char const* unsupported(EncodeTokensParams const& p) noexcept {
  if (char const* const sentence = wrong_shape(p.tokens, p.width)) return sentence;
  if (char const* const sentence = wrong_output(p.normed)) return sentence;
  if (p.users < 1 || p.slots < 0 || p.prefix_tokens < 0 || p.prefix_tokens > p.tokens) {
    return "users, slots or prefix_tokens are out of range";
  }
  if (p.action_count < 0 || p.action_count > kMaxActions) return "at most 12 kinds of actions";
  for (void const* const rows : {p.content, p.extra.rows, p.actions_table, p.contextual, p.position_table, p.time_table,
                                 static_cast<void const*>(p.x)}) {
    if (!is_aligned(rows, p.width)) return "rows must be 16-byte aligned";
  }
  bool const there = p.content && p.gain && p.bias && p.position_table && p.time_table && p.timestamps &&
                     p.prefix_offsets && p.candidate_offsets && p.norm_gain && p.norm_bias && p.x && p.normed.data;
  if (p.tokens > 0 && !there) return "a tensor is missing";
  if (p.actions_table && !p.actions) return "actions are missing";
  if (p.slots > 0 && !p.contextual) return "contextual rows are missing";
  return nullptr;
}

cudaError_t launch(EncodeTokensParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.tokens == 0) return cudaSuccess;
  return with_vectors(params.width, [&](auto vectors) {
    encode_tokens<vectors.value><<<row_blocks(params.tokens), kRowsPerBlock * kWarp, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace hstu_trt
