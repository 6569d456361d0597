// SPDX-License-Identifier: Apache-2.0
// HSTU attention with warp-wide matrix products (mma.sync), for compute capability 8.0 and up: every option, any GPU.
//
// A CTA computes one head of one work item: 128 query rows, dealt to its warps. It walks the item's key tiles, cached
// tokens first, then the prefix rows of this call, then the candidates' own rows; one tile is computed while the next
// arrives. Scores never leave their registers: a warp's S = Q K^T becomes the left operand of SiLU(S) V there. Rows
// that do not exist are zeros in shared memory, so whatever lies behind a user's rows never leaks.
#pragma once

#include "bias.cuh"
#include "fragments.cuh"
#include "launchers.h"
#include "smxx_load.cuh"
#include "smxx_mask.cuh"

namespace hstu_trt::smxx {

// Of one tile. Thread 4g + t of a warp holds rows 16i + g ([i][j][0], [1]) and + 8 ([2], [3]), keys 8j + 2t and + 1.
template <class T>
using Scores = float[T::kRowTiles][T::kKeys / 8][4];

// Likewise, over columns of the output.
template <class T>
using Sums = float[T::kRowTiles][T::kDim / 8][4];

// Address of 32 bytes by 16 rows, `step` times 32 bytes and `group` times 16 rows behind a lane's address.
template <int kPitch>
__device__ __forceinline__ uint32_t fragment_address(uint32_t lane_address, int group, int step) {
  return (lane_address ^ (step % 4 * 32)) + step / 4 * 128 + group * 16 * kPitch;
}

// A lane's address of matrices that lie rows first (left operands, transposed right ones) ...
template <int kPitch>
__device__ __forceinline__ uint32_t rows_first(uint32_t tile) {
  int const lane = threadIdx.x % 32;
  return tile + chunk_offset<kPitch>(lane % 16, lane / 16);
}

// ... and of matrices that lie bytes first (right operands as they are).
template <int kPitch>
__device__ __forceinline__ uint32_t bytes_first(uint32_t tile) {
  int const lane = threadIdx.x % 32;
  return tile + chunk_offset<kPitch>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// The queries of one warp, in registers or read again for each tile.
template <class T>
struct Queries {
  static constexpr int kHeld = T::kHoldQueries ? T::kDimSteps : 1;
  uint32_t lane_address;
  uint32_t held[T::kRowTiles][kHeld][4];

  __device__ __forceinline__ explicit Queries(uint32_t tile)
      : lane_address(rows_first<T::kRowBytes>(tile + threadIdx.x / 32 * T::kWarpRows * T::kRowBytes)) {}

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kHeld; ++step) load(held[i][step], i, step);
    }
  }

  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int row_tile, int step) const {
    if constexpr (T::kHoldQueries) {
#pragma unroll
      for (int r = 0; r < 4; ++r) fragment[r] = held[row_tile][step][r];
    } else {
      load(fragment, row_tile, step);
    }
  }

 private:
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int row_tile, int step) const {
    load_matrices(fragment, fragment_address<T::kRowBytes>(lane_address, row_tile, step));
  }
};

template <class T>
__device__ __forceinline__ void multiply_keys(Scores<T>& scores, Queries<T> const& queries, uint32_t keys) {
  uint32_t const lane_address = bytes_first<T::kRowBytes>(keys);
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < T::kKeys / 8; ++j) scores[i][j][0] = scores[i][j][1] = scores[i][j][2] = scores[i][j][3] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < T::kDimSteps; ++step) {
    uint32_t q[T::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) queries.get(q[i], i, step);
#pragma unroll
    for (int j = 0; j < T::kKeys / 16; ++j) {
      uint32_t k[4];
      load_matrices(k, fragment_address<T::kRowBytes>(lane_address, j, step));
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
        multiply_add<typename T::Element>(scores[i][2 * j], q[i], k[0], k[1]);
        multiply_add<typename T::Element>(scores[i][2 * j + 1], q[i], k[2], k[3]);
      }
    }
  }
}

// scores = half_alpha * scores + bias / 2.
template <class T>
__device__ __forceinline__ void add_bias(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                         KeyTile tile, float half_alpha, Scores<T>& scores) {
  static_assert(!T::kBias || T::kRowTiles == 1, "two query rows per thread");
  int const lane = threadIdx.x % 32;
  int position[2];
  int64_t time[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = min(lane / 4 + half * 8, rows.count - 1);
    position[half] = rows.candidates ? item.user.prefix : rows.position + row;
    time[half] = __ldg(p.query_timestamps + item.query_row(rows.candidates, rows.first_row + row));
  }
  bool const candidates = tile.section == Section::kCandidates;
#pragma unroll
  for (int j = 0; j < T::kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const key = min(tile.first + 8 * j + lane % 4 * 2 + i, tile.end - 1);
      int64_t const key_time = __ldg(p.key_timestamps + item.key_row(tile.section, key));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const bias = relative_bias(p, position[half], candidates ? item.user.prefix : key, time[half], key_time);
        scores[0][j][2 * half + i] = fmaf(scores[0][j][2 * half + i], half_alpha, 0.5f * bias);
      }
    }
  }
}

// SiLU of one step's scores as the left operand of their product with the values.
template <class T>
__device__ __forceinline__ void activate(Scores<T> const& scores, int step, float half_alpha,
                                         uint32_t (&weights)[T::kRowTiles][4]) {
  auto const silu = [half_alpha](float score) {
    float const half_x = T::kBias ? score : score * half_alpha;
    return fmaf(half_x, tanh_approx(half_x), half_x);
  };
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int const first = r % 2 * 2;
      if constexpr (T::kFp8) {
        float const(&low)[4] = scores[i][4 * step + r / 2 * 2];
        float const(&high)[4] = scores[i][4 * step + r / 2 * 2 + 1];
        weights[i][r] = pack_fp8(silu(low[first]), silu(low[first + 1]), silu(high[first]), silu(high[first + 1]));
      } else {
        float const(&pair)[4] = scores[i][2 * step + r / 2];
        weights[i][r] = pack_pair<typename T::Element>(silu(pair[first]), silu(pair[first + 1]));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply_values(Sums<T>& sums, Scores<T> const& scores, float half_alpha,
                                                uint32_t values) {
  constexpr int kPitch = T::kValueRowBytes;
  uint32_t const lane_address = T::kFp8 ? bytes_first<kPitch>(values) : rows_first<kPitch>(values);
#pragma unroll
  for (int step = 0; step < T::kKeySteps; ++step) {
    uint32_t weights[T::kRowTiles][4];
    activate<T>(scores, step, half_alpha, weights);
#pragma unroll
    for (int j = 0; j < T::kDim / 16; ++j) {
      uint32_t v[4];
      if constexpr (T::kFp8) {
        load_matrices(v, fragment_address<kPitch>(lane_address, j, step));
      } else {
        load_matrices_transposed(v, fragment_address<kPitch>(lane_address, step, j));
      }
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
        multiply_add<typename T::Element>(sums[i][2 * j], weights[i], v[0], v[1]);
        multiply_add<typename T::Element>(sums[i][2 * j + 1], weights[i], v[2], v[3]);
      }
    }
  }
}

// Lane t of four gets word t of each: words[i] comes from lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  bool const odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t const received = __shfl_xor_sync(~0u, odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t const received = __shfl_xor_sync(~0u, high ? words[i] : words[i + 2], 2);
    (high ? words[i] : words[i + 2]) = received;
  }
}

// Writes one row of sums: four lanes hold it, each two of every eight columns.
template <class Output, int kDim>
__device__ __forceinline__ void store_row(float const (&sums)[kDim / 8][4], int half, float scale, int columns,
                                          Output* out) {
  int const lane = threadIdx.x % 4;
  if constexpr (sizeof(Output) == 4) {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      float2 const pair{sums[j][2 * half] * scale, sums[j][2 * half + 1] * scale};
      if (out && 8 * j < columns) *reinterpret_cast<float2*>(out + 8 * j + 2 * lane) = pair;
    }
  } else {
    // Each lane collects eight neighbouring columns: 16 bytes.
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack_pair<Output>(sums[j + i][2 * half] * scale, sums[j + i][2 * half + 1] * scale);
      }
      transpose_quad(words);
      if (out && 8 * (j + lane) < columns) {
        *reinterpret_cast<uint4*>(out + 8 * (j + lane)) = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

template <class T, class Output>
__device__ __forceinline__ void store_sums(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                           Sums<T> const& sums) {
  float const value_scale = T::kFp8 ? p.v_scale[p.scale_count > 1 ? item.head : 0] : 1.f;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = 16 * i + 8 * half + threadIdx.x % 32 / 4;
      Output* out = nullptr;
      float scale = 0.f;
      if (row < rows.count) {
        int const query_row = item.query_row(rows.candidates, rows.first_row + row);
        out = static_cast<Output*>(p.out.data) + query_row * p.out.row_stride + item.head * p.out.head_stride;
        scale = output_scale(p, item.user_index, query_row) * value_scale;
      }
      store_row<Output, T::kDim>(sums[i], half, scale, p.v_dim, out);
    }
  }
}

// Adds one tile to the sums of a warp.
template <class T>
__device__ __forceinline__ void compute_tile(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                             KeyTile tile, Queries<T> const& queries, float half_alpha, uint32_t keys,
                                             uint32_t values, Sums<T>& sums) {
  TileUse const use = tile_use<T>(rows, tile);
  if (use == TileUse::kSkip) return;
  Scores<T> scores;
  multiply_keys<T>(scores, queries, keys);
  if constexpr (T::kBias) add_bias<T>(p, item, rows, tile, half_alpha, scores);
  if (use == TileUse::kMask) mask_scores<T>(p, item, rows, tile, scores);
  multiply_values<T>(sums, scores, half_alpha, values);
}

template <class T>
__device__ __forceinline__ void compute_item(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                             uint32_t memory) {
  Queries<T> queries(memory + (T::kHoldQueries ? 0 : kStages * T::kStageBytes));
  load_queries<T>(p, item, memory + (T::kHoldQueries ? 0 : kStages * T::kStageBytes));
  copies_commit();
  if constexpr (T::kHoldQueries) {
    copies_wait<0>();
    __syncthreads();
    queries.hold();
    __syncthreads();
  }
  auto const load = [&](int step) {
    uint32_t const stage = memory + step % kStages * T::kStageBytes;
    load_tile<T>(p, item, item.tile<T::kKeys>(step), stage, stage + T::kTileBytes);
    copies_commit();
  };

  int const scale_index = p.scale_count > 1 ? item.head : 0;
  float const half_alpha = 0.5f * p.alpha * (T::kFp8 ? p.q_scale[scale_index] * p.k_scale[scale_index] : 1.f);
  Sums<T> sums = {};
  int const tiles = item.tiles;
  if (tiles > 0) load(0);
  for (int step = 0; step < tiles; ++step) {
    // The tile has arrived, and no warp reads the other stage any more.
    copies_wait<0>();
    __syncthreads();
    if (step + 1 < tiles) load(step + 1);
    uint32_t const stage = memory + step % kStages * T::kStageBytes;
    compute_tile<T>(p, item, rows, item.tile<T::kKeys>(step), queries, half_alpha, stage, stage + T::kTileBytes, sums);
  }

  switch (p.output_type) {
    case DataType::kFloat16: return store_sums<T, __half>(p, item, rows, sums);
    case DataType::kBFloat16: return store_sums<T, __nv_bfloat16>(p, item, rows, sums);
    default: return store_sums<T, float>(p, item, rows, sums);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm) kernel(__grid_constant__ AttentionParams const p) {
#if __CUDA_ARCH__ >= 890 || !defined(__CUDA_ARCH__)
  constexpr bool kRuns = true;
#else
  constexpr bool kRuns = !T::kFp8;
#endif
  if constexpr (kRuns) {
    extern __shared__ __align__(128) uint8_t memory[];
    // In shared memory rather than in every thread's registers: sums and scores need them all.
    __shared__ ItemState item;
    __shared__ WarpRows warps[T::kThreads / 32];
    auto const* const plan = static_cast<PlanHeader const*>(p.workspace);
    int const index = blockIdx.x / p.heads;
    if (index >= plan->num_items) return;
    if (threadIdx.x == 0) {
      auto const* const items = reinterpret_cast<WorkItem const*>(plan + 1);
      item = read_item<T::kKeys>(p, items[index], blockIdx.x % p.heads);
    }
    __syncthreads();
    WarpRows& rows = warps[threadIdx.x / 32];
    find_warp_rows<T>(p, item, rows);
    compute_item<T>(p, item, rows, shared_address(memory));
  }
}

template <class T>
cudaError_t launch_kernel(AttentionParams const& p, cudaStream_t stream) {
  PlanShape const shape = smxx_plan_shape(p);
  int64_t const ctas = static_cast<int64_t>(plan_max_items(p, shape)) * p.heads;
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  auto const function = reinterpret_cast<void const*>(&kernel<T>);
  cudaError_t const error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<AttentionParams*>(&p)};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(ctas)), dim3(T::kThreads), arguments, T::kSharedBytes,
                          stream);
}

// One translation unit each.
template <class Element>
cudaError_t launch(AttentionParams const& p, int dim, cudaStream_t stream) {
  bool const bias = p.position_bias != nullptr;
  switch (dim) {
    case 32:
      return bias ? launch_kernel<Traits<Element, 32, true>>(p, stream)
                  : launch_kernel<Traits<Element, 32, false>>(p, stream);
    case 64:
      return bias ? launch_kernel<Traits<Element, 64, true>>(p, stream)
                  : launch_kernel<Traits<Element, 64, false>>(p, stream);
    case 128:
      return bias ? launch_kernel<Traits<Element, 128, true>>(p, stream)
                  : launch_kernel<Traits<Element, 128, false>>(p, stream);
    case 256:
      return bias ? launch_kernel<Traits<Element, 256, true>>(p, stream)
                  : launch_kernel<Traits<Element, 256, false>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hstu_trt::smxx
