// SPDX-License-Identifier: Apache-2.0
// From the sums of one warp to rows of the output: scaled, converted, 16 bytes at a time.
#pragma once

#include "fragments.cuh"
#include "smxx_load.cuh"
#include "smxx_mask.cuh"
#include "smxx_products.cuh"

namespace hstu_trt::smxx {

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

}  // namespace hstu_trt::smxx
