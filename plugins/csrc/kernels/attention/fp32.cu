// SPDX-License-Identifier: Apache-2.0
// One warp per query row and head. It asks the mask's rule about every pair, as the rule stands in export/attention.py
// (valid_pairs), and never reads a key or value that the query does not see.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "bias.cuh"
#include "launchers.h"
#include "mask.cuh"
#include "value_blocks.h"

namespace hstu_trt {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 4;
// Output columns of one warp: 8 sums per lane. Wider values take more warps, each with all scores.
constexpr int kLaneColumns = 8;
constexpr int kColumns = kLaneColumns * kWarpSize;

// One row of q: whose it is, and where it stands among its user's tokens.
struct Query {
  int user;
  int position;  // local: prefix tokens, then candidates
  bool exists;
};

// Last user whose rows begin at or before `row`.
__device__ int find_user(int32_t const* offsets, int users, int row) {
  int low = 0, high = users - 1;
  while (low < high) {
    int const middle = (low + high + 1) / 2;
    if (offsets[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ Query find_query(AttentionParams const& p, int row) {
  int const prefix_rows = p.query_offsets[p.users];
  if (row < prefix_rows) {
    int const user = find_user(p.query_offsets, p.users, row);
    UserShape const shape = user_shape(p, user);
    return {user, shape.prefix - shape.queries + row - shape.query_row, true};
  }
  int const candidate = row - prefix_rows;
  if (candidate >= p.candidate_offsets[p.users]) return {0, 0, false};
  int const user = find_user(p.candidate_offsets, p.users, candidate);
  return {user, user_shape(p, user).prefix + candidate - p.candidate_offsets[user], true};
}

// Contextual tokens share id 0, candidates share id `end`; others count from the first non-contextual token.
__device__ int token_id(AttentionParams const& p, int position, int prefix, int end) {
  int id = position;
  if (p.contextual_seq_len > 0) id = max(id - p.contextual_seq_len + 1, 0);
  return min(position < prefix ? id : end, end);
}

__device__ bool valid_pair(AttentionParams const& p, int query, int key, int prefix) {
  int const end = prefix - (p.contextual_seq_len > 0 ? p.contextual_seq_len - 1 : 0);
  int const query_id = token_id(p, query, prefix, end), key_id = token_id(p, key, prefix, end);
  int const distance = p.causal ? query_id - key_id : abs(query_id - key_id);
  bool valid = query == key || distance > 0;
  if (key >= prefix && key < query) {
    valid = (query - prefix) / p.candidate_group_size == (key - prefix) / p.candidate_group_size;
  }
  if (p.max_attn_len > 0) {
    bool near = distance <= p.max_attn_len;
    if (p.min_full_attn_seq_len > 0) near |= query_id >= end - p.min_full_attn_seq_len;
    valid &= near;
  }
  if (p.contextual_seq_len > 0) valid |= query_id == 0 && key_id < end;
  return valid;
}

// Elements of one row and head of k or v: `data[column * stride]`.
template <typename T>
struct Row {
  T const* data;
  int stride;

  __device__ float operator[](int column) const {
    return static_cast<float>(data[static_cast<int64_t>(column) * stride]);
  }
};

template <typename T>
__device__ Row<T> token_row(TokenTensor const& tensor, int row, int head) {
  return {static_cast<T const*>(tensor.data) + row * tensor.row_stride + head * tensor.head_stride, 1};
}

// Value `index` of a user whose values begin at `block`.
template <typename T>
__device__ Row<T> value_block_row(AttentionParams const& p, void const* blocks, int block, int index, int head) {
  int const key = index % kValueBlockKeys;
  int const slot = key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
  int64_t const head_block = static_cast<int64_t>(block + index / kValueBlockKeys) * p.heads + head;
  return {static_cast<T const*>(blocks) + head_block * p.v_dim * kValueBlockKeys + slot, kValueBlockKeys};
}

template <typename T>
struct KeyValue {
  Row<T> key;
  Row<T> value;
};

// The key at `position` of a user: cached, a prefix row of this call, or a candidate.
template <typename T>
__device__ KeyValue<T> find_key(AttentionParams const& p, UserShape const& user, int user_index, int position,
                                int head) {
  constexpr bool fp8 = sizeof(T) == 1;
  if (position < user.cached && p.page_table) {
    int const page = p.page_table[static_cast<int64_t>(user_index) * p.pages_per_user + position / p.page_size];
    int const row = page * p.page_size + position % p.page_size;
    return {token_row<T>(p.cached_k, row, head),
            fp8 ? value_block_row<T>(p, p.cached_v.data, page, position % p.page_size, head)
                : token_row<T>(p.cached_v, row, head)};
  }
  if (position < user.cached) {
    int const row = user.cached_row + position, block = first_value_block(user.cached_row, user_index);
    return {token_row<T>(p.cached_k, row, head),
            fp8 ? value_block_row<T>(p, p.cached_v.data, block, position, head) : token_row<T>(p.cached_v, row, head)};
  }
  bool const candidate = position >= user.prefix;
  int const index = position - (candidate ? user.prefix : user.cached);
  int const row = index + (candidate ? user.key_candidate_row : user.key_row);
  int const section = candidate ? value_blocks(p.key_rows, p.users) : 0;
  int const first = candidate ? p.candidate_offsets[user_index] : user.key_row;
  return {token_row<T>(p.k, row, head),
          fp8 && p.packed_values
              ? value_block_row<T>(p, p.v.data, section + first_value_block(first, user_index), index, head)
              : token_row<T>(p.v, row, head)};
}

// Sum over a long list of terms: the rounding error of one addition, not of all.
struct KahanSum {
  float sum = 0.f;
  float lost = 0.f;

  __device__ void add(float term) {
    float const y = __fsub_rn(term, lost);
    float const next = __fadd_rn(sum, y);
    lost = __fsub_rn(__fsub_rn(next, sum), y);
    sum = next;
  }
};

template <typename T>
__device__ float dot(Row<T> a, Row<T> b, int columns, int lane) {
  float sum = 0.f;
  for (int column = lane; column < columns; column += kWarpSize) sum = fmaf(a[column], b[column], sum);
  for (int other = kWarpSize / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  return sum;
}

__device__ float output_scale(AttentionParams const& p, int user, int row) {
  if (p.attn_scale) return p.attn_scale[p.attn_scale_count > 1 ? row : 0];
  return 1.f / p.norm[p.norm_count > 1 ? user : 0];
}

__device__ void store(AttentionParams const& p, int row, int head, int column, float value) {
  int64_t const index = row * p.out.row_stride + head * p.out.head_stride + column;
  if (p.output_type == DataType::kFloat32)
    static_cast<float*>(p.out.data)[index] = value;
  else if (p.output_type == DataType::kFloat16)
    static_cast<__half*>(p.out.data)[index] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(p.out.data)[index] = __float2bfloat16_rn(value);
}

template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize) fp32_kernel(AttentionParams const p) {
  int const lane = threadIdx.x % kWarpSize;
  int const warp = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarpSize;
  int const row = warp / p.heads, head = warp % p.heads;
  if (row >= p.query_rows) return;
  Query const query = find_query(p, row);
  if (!query.exists) return;
  UserShape const user = user_shape(p, query.user);
  Row<T> const q = token_row<T>(p.q, row, head);
  int const scale_index = p.scale_count > 1 ? head : 0;
  float const score_scale = p.alpha * (p.scale_count ? p.q_scale[scale_index] * p.k_scale[scale_index] : 1.f);
  int const first_column = blockIdx.y * kColumns + lane;

  KahanSum sums[kLaneColumns];
  for (int first = 0; first < user.prefix + user.candidates; first += kWarpSize) {
    // Each lane asks about one key, then the warp visits the keys that are seen, one by one.
    bool const seen =
        first + lane < user.prefix + user.candidates && valid_pair(p, query.position, first + lane, user.prefix);
    for (unsigned keys = __ballot_sync(~0u, seen); keys != 0; keys &= keys - 1) {
      int const position = first + __ffs(keys) - 1;
      KeyValue<T> const pair = find_key<T>(p, user, query.user, position, head);
      float score = score_scale * dot(q, pair.key, p.qk_dim, lane);
      if (p.position_bias) {
        int const key_row =
            position < user.prefix ? user.key_row + position : user.key_candidate_row + position - user.prefix;
        score += relative_bias(p, min(query.position, user.prefix), min(position, user.prefix), p.query_timestamps[row],
                               p.key_timestamps[key_row]);
      }
      float const weight = __fdiv_rn(score, 1.f + expf(-score));
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        int const column = first_column + i * kWarpSize;
        if (column < p.v_dim) sums[i].add(weight * pair.value[column]);
      }
    }
  }

  float const scale = output_scale(p, query.user, row) * (p.scale_count ? p.v_scale[scale_index] : 1.f);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    int const column = first_column + i * kWarpSize;
    if (column < p.v_dim) store(p, row, head, column, sums[i].sum * scale);
  }
}

template <typename T>
cudaError_t launch(AttentionParams const& p, cudaStream_t stream) {
  int64_t const warps = static_cast<int64_t>(p.query_rows) * p.heads;
  if (warps == 0) return cudaSuccess;
  dim3 const grid(static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock),
                  static_cast<unsigned>((p.v_dim + kColumns - 1) / kColumns));
  void* arguments[] = {const_cast<AttentionParams*>(&p)};
  return cudaLaunchKernel(reinterpret_cast<void const*>(&fp32_kernel<T>), grid, dim3(kWarpsPerBlock * kWarpSize),
                          arguments, 0, stream);
}

}  // namespace

char const* fp32_unsupported(AttentionParams const& p) noexcept {
  bool const fp8 = p.type == DataType::kFloat8E4M3;
  if (p.output_type == DataType::kFloat8E4M3) return "fp32: the output must be fp32, fp16 or bf16";
  if (p.position_bias && p.cached_offsets) return "fp32: relative bias and cached keys do not go together";
  if (fp8 && p.page_table && p.page_size != kValueBlockKeys) {
    return "fp32: pages of an fp8 cache hold 128 tokens, one value block";
  }
  if (static_cast<int64_t>(p.query_rows) * p.heads > INT32_MAX) return "fp32: too many query rows";
  return nullptr;
}

cudaError_t launch_fp32(AttentionParams const& params, cudaStream_t stream) noexcept {
  switch (params.type) {
    case DataType::kFloat32: return launch<float>(params, stream);
    case DataType::kFloat16: return launch<__half>(params, stream);
    case DataType::kBFloat16: return launch<__nv_bfloat16>(params, stream);
    case DataType::kFloat8E4M3: return launch<__nv_fp8_e4m3>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace hstu_trt
