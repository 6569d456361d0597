// SPDX-License-Identifier: Apache-2.0
// A row in the registers of one warp: lane l holds the vectors l, l + 32, ... of 8 neighbouring elements.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

namespace hstu_trt {

constexpr int kWarp = 32;
constexpr int kVector = 8;
constexpr int kRowsPerBlock = 8;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// kVectors per lane: rows of up to 256 * kVectors elements.
template <int kVectors>
struct Row {
  float values[kVectors][kVector];

  static __device__ int element(int vector) {
    return (vector * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kVector;
  }

  // Calls f(vector, element) for the vectors of this lane that are in the row.
  template <class F>
  static __device__ void each(int width, F const& f) {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
      if (element(vector) < width) f(vector, element(vector));
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[vector][i] = 0.0f;
    }
  }

  __device__ void load(void const* row, int width) {
    clear();
    each(width, [&](int vector, int at) {
      uint4 const bits = *reinterpret_cast<uint4 const*>(static_cast<__half const*>(row) + at);
      auto const* const pairs = reinterpret_cast<__half2 const*>(&bits);
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        float2 const pair = __half22float2(pairs[i]);
        values[vector][2 * i] = pair.x;
        values[vector][2 * i + 1] = pair.y;
      }
    });
  }

  __device__ void load(float const* row, int width) {
    clear();
    each(width, [&](int vector, int at) {
#pragma unroll
      for (int i = 0; i < kVector / 4; ++i) {
        float4 const four = __ldg(reinterpret_cast<float4 const*>(row + at) + i);
        values[vector][4 * i] = four.x;
        values[vector][4 * i + 1] = four.y;
        values[vector][4 * i + 2] = four.z;
        values[vector][4 * i + 3] = four.w;
      }
    });
  }

  // values = f(values, other's values)
  template <class F>
  __device__ void combine(Row const& other, F const& f) {
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[vector][i] = f(values[vector][i], other.values[vector][i]);
    }
  }

  __device__ void add(Row const& other) {
    combine(other, [](float a, float b) { return a + b; });
  }
  __device__ void multiply(Row const& other) {
    combine(other, [](float a, float b) { return a * b; });
  }

  // Elements as fp16 will hold them.
  __device__ void round_to_half() {
    combine(*this, [](float a, float) { return __half2float(__float2half_rn(a)); });
  }

  __device__ float sum() const {
    float total = 0.0f;
#pragma unroll
    for (int vector = 0; vector < kVectors; ++vector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) total += values[vector][i];
    }
    return warp_sum(total);
  }

  // Sum of (values - center)^2 over the row's elements.
  __device__ float squares(float center, int width) const {
    float total = 0.0f;
    each(width, [&](int vector, int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float const difference = values[vector][i] - center;
        total += difference * difference;
      }
    });
    return warp_sum(total);
  }

  // (x - mean) / sqrt(variance + eps) * gain + bias
  __device__ void layer_norm(float const* gain, float const* bias, int width, float eps) {
    float const mean = sum() / width;
    float const scale = rsqrtf(squares(mean, width) / width + eps);
    Row weights;
    weights.load(gain, width);
    combine(weights, [=](float x, float g) { return (x - mean) * scale * g; });
    weights.load(bias, width);
    add(weights);
  }

  __device__ void store_half(void* row, int width) const {
    each(width, [&](int vector, int at) {
      uint4 bits;
      auto* const pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        pairs[i] = __floats2half2_rn(values[vector][2 * i], values[vector][2 * i + 1]);
      }
      *reinterpret_cast<uint4*>(static_cast<__half*>(row) + at) = bits;
    });
  }

  __device__ void store_fp8(void* row, int width, float scale) const {
    float const inverse = 1.0f / scale;
    each(width, [&](int vector, int at) {
      uint2 bits;
      auto* const pairs = reinterpret_cast<__nv_fp8x2_storage_t*>(&bits);
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        float2 const pair{values[vector][2 * i] * inverse, values[vector][2 * i + 1] * inverse};
        pairs[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
      }
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(row) + at) = bits;
    });
  }

  // To columns from `column` on of a row of `out`.
  __device__ void store(RowsOut const& out, int64_t row, int column, int width) const {
    int64_t const at = row * out.stride + column;
    if (out.type == DataType::kFloat16) {
      store_half(static_cast<__half*>(out.data) + at, width);
    } else {
      store_fp8(static_cast<uint8_t*>(out.data) + at, width, out.scale);
    }
  }
};

__device__ __forceinline__ void const* half_row(void const* rows, int64_t row, int64_t stride) {
  return static_cast<__half const*>(rows) + row * stride;
}

__device__ __forceinline__ void* half_row(void* rows, int64_t row, int64_t stride) {
  return static_cast<__half*>(rows) + row * stride;
}

// The row of this warp.
__device__ __forceinline__ int row_of_warp() {
  return static_cast<int>(blockIdx.x) * kRowsPerBlock + static_cast<int>(threadIdx.x) / kWarp;
}

inline unsigned row_blocks(int rows) { return static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock); }

// Calls f with the number of vectors per lane that rows of a width need, as a compile-time constant.
template <class F>
cudaError_t with_vectors(int width, F const& f) {
  if (width <= 256) return f(std::integral_constant<int, 1>());
  if (width <= 512) return f(std::integral_constant<int, 2>());
  if (width <= 1024) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 8>());
}

// ---- what `unsupported` asks ----

inline bool is_aligned(void const* data, int64_t stride, int element_bytes = 2) {
  int const bytes = kVector * element_bytes;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * element_bytes % bytes == 0;
}

inline bool is_aligned(RowsOut const& out) {
  return is_aligned(out.data, out.stride, out.type == DataType::kFloat8E4M3 ? 1 : 2);
}

inline char const* wrong_shape(int rows, int width) {
  if (rows < 0) return "the number of rows must not be negative";
  if (width < kVector || width > kMaxRowWidth || width % kVector) return "a row's width is a multiple of 8, up to 2048";
  return nullptr;
}

inline char const* wrong_output(RowsOut const& out) {
  if (out.type != DataType::kFloat16 && out.type != DataType::kFloat8E4M3) return "the output is fp16 or e4m3";
  if (out.type == DataType::kFloat8E4M3 && !(out.scale > 0)) return "an e4m3 output needs a scale above 0";
  if (!is_aligned(out)) return "the output's rows must be aligned to 8 of its elements";
  return nullptr;
}

}  // namespace hstu_trt
