// SPDX-License-Identifier: Apache-2.0
// Pieces of rows: how they are loaded, converted as tables/csrc/convert_rows.cpp does, bit by bit, and stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace hstu_trt {

constexpr int kVectorBytes = 16;

// `kCount` neighbouring elements, moved as one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Pack {
  T elements[kCount];
};

template <class T>
constexpr bool kIsQuantised = std::is_same_v<T, int8_t> || std::is_same_v<T, __nv_fp8_e4m3>;

// Table rows are read once: they go past the first-level cache.
template <class PackT>
__device__ __forceinline__ PackT load_row(PackT const* from) {
  PackT result;
  auto* const words = reinterpret_cast<uint32_t*>(&result);
  if constexpr (sizeof(PackT) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
  } else if constexpr (sizeof(PackT) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
  } else if constexpr (sizeof(PackT) == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
  } else {
    result = *from;
  }
  return result;
}

template <class Out>
__device__ __forceinline__ Out rounded(float value) {
  if constexpr (std::is_same_v<Out, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// The four signed bytes of a word. A byte plus 128, put into the mantissa of 2^23, is that number plus 2^23.
__device__ __forceinline__ void codes_to_floats(uint32_t word, float* values) {
  constexpr uint32_t k2To23 = 0x4B000000u;
  uint32_t const shifted = word ^ 0x80808080u;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    values[i] = __uint_as_float(__byte_perm(shifted, k2To23, 0x7440u | i)) - 8388736.f;
  }
}

// Stored elements, times the row's scale if they are quantised, rounded to nearest even.
template <class Out, class T, int kCount>
__device__ __forceinline__ Pack<Out, kCount> convert(Pack<T, kCount> const& stored, float scale) {
  if constexpr (std::is_same_v<T, Out>) {
    return stored;
  } else {
    Pack<Out, kCount> result;
    if constexpr (std::is_same_v<T, int8_t> && kCount % 4 == 0) {
      float values[kCount];
      auto const* const words = reinterpret_cast<uint32_t const*>(&stored);
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n) codes_to_floats(words[n], values + 4 * n);
#pragma unroll
      for (int n = 0; n < kCount; ++n) result.elements[n] = rounded<Out>(values[n] * scale);
    } else {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        float const value = static_cast<float>(stored.elements[n]);
        result.elements[n] = rounded<Out>(kIsQuantised<T> ? value * scale : value);
      }
    }
    return result;
  }
}

}  // namespace hstu_trt
