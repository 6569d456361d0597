// SPDX-License-Identifier: Apache-2.0
// Scores as the tensor cores leave them in registers: thread t of four warps holds rows fragment_row(t) (registers 4j,
// 4j + 1) and + 8 (4j + 2, 4j + 3), columns 8j + t % 4 * 2 and + 1.
#pragma once

#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "mask.cuh"

namespace hstu_trt {

__device__ __forceinline__ int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Sets what stands outside the rows' key ranges to 0, whatever it holds. Column 0 is key `position`.
template <int kCount>
__device__ __forceinline__ void mask_scores(float (&scores)[kCount], KeyRange const (&range)[2], int position,
                                            int thread) {
  int const first_column = position + thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bool const empty = range[half].first > range[half].last;
    unsigned const span = empty ? 0 : range[half].last - range[half].first;
    int const first = empty ? -1 : range[half].first;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[4 * j + 2 * half + i];
        score = static_cast<unsigned>(first_column + 8 * j + i - first) <= span ? score : 0.f;
      }
    }
  }
}

// SiLU(x) = x / 2 * (1 + tanh(x / 2)), with x / 2 = score * half_alpha.
template <int kCount>
__device__ __forceinline__ void silu(float (&scores)[kCount], float half_alpha) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float const half_x = scores[i] * half_alpha;
    scores[i] = fmaf(half_x, tanh_approx(half_x), half_x);
  }
}

// Two neighbouring columns as one register.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t pack_fp8(float a, float b, float c, float d) {
  uint32_t four;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(four)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}

// Scores of one product as the left operand of the next. Halves keep the order of the columns; fp8 takes four columns
// of a thread together, so the keys of each 16 stand in the order of value_blocks.h.
template <class Element, int kCount, int kSteps>
__device__ __forceinline__ void pack_fragments(float const (&scores)[kCount], uint32_t (&packed)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (sizeof(Element) == 1) {
      float const* s = scores + 16 * step;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const at = i / 2 * 8 + i % 2 * 2;
        packed[step][i] = pack_fp8(s[at], s[at + 1], s[at + 4], s[at + 5]);
      }
    } else {
      float const* s = scores + 8 * step;
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[step][i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]);
    }
  }
}

// Whether all query rows have one scale, known before any row is.
__device__ __forceinline__ bool has_scale_of_all(AttentionParams const& params) {
  return params.attn_scale ? params.attn_scale_count == 1 : params.norm_count == 1;
}

__device__ __forceinline__ float scale_of_all(AttentionParams const& params) {
  if (!has_scale_of_all(params)) return 0.f;
  return params.attn_scale ? *params.attn_scale : 1.f / *params.norm;
}

// What the sums of a query row are multiplied with: its attn_scale, or 1 / N.
__device__ __forceinline__ float output_scale(AttentionParams const& params, int user, int row) {
  if (params.attn_scale) return params.attn_scale[params.attn_scale_count == 1 ? 0 : row];
  return 1.f / params.norm[params.norm_count == 1 ? 0 : user];
}

}  // namespace hstu_trt
