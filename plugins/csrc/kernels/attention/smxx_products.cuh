// SPDX-License-Identifier: Apache-2.0
// The products of one warp with a tile in shared memory: scores, bias and SiLU in registers, sums.
#pragma once

#include "bias.cuh"
#include "fragments.cuh"
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

}  // namespace hstu_trt::smxx
