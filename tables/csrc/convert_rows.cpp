// SPDX-License-Identifier: Apache-2.0
#include "convert_rows.h"

#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#define HSTU_TRT_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace hstu_trt {
namespace {

template <typename To, typename From>
To bits_as(From const& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float half_to_float(uint16_t half) {
  uint32_t const sign = (half & 0x8000u) << 16;
  uint32_t const exponent = (half >> 10) & 31, mantissa = half & 0x3FFu;
  if (exponent == 31) return bits_as<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float value) {
  uint32_t const bits = bits_as<uint32_t>(value);
  uint32_t const sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | (magnitude >> 13 & 0x1FFu);
  } else if (magnitude >= 0x47800000u) {
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {
    // The sum with 0.5 has a last place of 2^-24, that of subnormal halves: the addition rounds.
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

// e4m3 bits moved into a half give the value by 2^8, subnormals included; 0x7F and 0xFF are NaN.
float e4m3_to_float(uint8_t code) {
  if ((code & 0x7Fu) == 0x7Fu) return std::numeric_limits<float>::quiet_NaN();
  return half_to_float(static_cast<uint16_t>((code & 0x80u) << 8 | (code & 0x7Fu) << 7)) * 256.0f;
}

float stored_value(float value, float) { return value; }
float stored_value(uint16_t half, float) { return half_to_float(half); }
float stored_value(int8_t code, float scale) { return static_cast<float>(code) * scale; }
float stored_value(uint8_t code, float scale) { return e4m3_to_float(code) * scale; }

void store(float value, float* out) { std::memcpy(out, &value, sizeof(value)); }
void store(float value, uint16_t* out) {
  uint16_t const half = float_to_half(value);
  std::memcpy(out, &half, sizeof(half));
}

template <typename Stored, typename Out>
void convert_portable(void const* row, float scale, void* out, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) {
    Stored value;
    std::memcpy(&value, static_cast<Stored const*>(row) + i, sizeof(value));
    store(stored_value(value, scale), static_cast<Out*>(out) + i);
  }
}

template <int Bytes>
void copy_row(void const* row, float, void* out, int64_t dim) {
  std::memcpy(out, row, dim * Bytes);
}

#if defined(__x86_64__)

HSTU_TRT_AVX2 inline __m256 load8(float const* row, __m256) { return _mm256_loadu_ps(row); }

HSTU_TRT_AVX2 inline __m256 load8(uint16_t const* row, __m256) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(row)));
}

HSTU_TRT_AVX2 inline __m256 load8(int8_t const* row, __m256 scale) {
  __m128i const codes = _mm_loadl_epi64(reinterpret_cast<__m128i const*>(row));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale);
}

HSTU_TRT_AVX2 inline __m256 load8(uint8_t const* row, __m256 scale) {
  __m128i const codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(row)));
  __m128i const magnitude = _mm_and_si128(codes, _mm_set1_epi16(0x7F));
  __m128i const sign = _mm_slli_epi16(_mm_and_si128(codes, _mm_set1_epi16(0x80)), 8);
  __m256 const small = _mm256_cvtph_ps(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7)));
  __m256 const nan = _mm256_castsi256_ps(
      _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F))));  // all ones, a NaN, or zero
  return _mm256_mul_ps(_mm256_or_ps(_mm256_mul_ps(small, _mm256_set1_ps(256.0f)), nan), scale);
}

HSTU_TRT_AVX2 inline void store8(__m256 values, float* out) { _mm256_storeu_ps(out, values); }

HSTU_TRT_AVX2 inline void store8(__m256 values, uint16_t* out) {
  __m128i const halves = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
}

template <typename Stored, typename Out>
HSTU_TRT_AVX2 void convert_avx2(void const* row, float scale, void* out, int64_t dim) {
  auto const* from = static_cast<Stored const*>(row);
  auto* to = static_cast<Out*>(out);
  __m256 const scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) {
    __m256 const low = load8(from + i, scales), high = load8(from + i + 8, scales);
    store8(low, to + i);
    store8(high, to + i + 8);
  }
  for (; i + 8 <= dim; i += 8) store8(load8(from + i, scales), to + i);
  convert_portable<Stored, Out>(from + i, scale, to + i, dim - i);
}

bool has_avx2() {
  static bool const has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}

#endif

template <typename Stored, typename Out>
ConvertRow pick(bool portable) {
#if defined(__x86_64__)
  if (!portable && has_avx2()) return convert_avx2<Stored, Out>;
#endif
  return convert_portable<Stored, Out>;
}

template <typename Out>
ConvertRow pick_to(RowType type, bool portable) {
  switch (type) {
    case RowType::kFloat32: return pick<float, Out>(portable);
    case RowType::kFloat16: return pick<uint16_t, Out>(portable);
    case RowType::kInt8: return pick<int8_t, Out>(portable);
    case RowType::kFloat8E4m3: return pick<uint8_t, Out>(portable);
  }
  return nullptr;
}

}  // namespace

ConvertRow find_convert_row(RowType type, RowType out_type, bool portable) {
  if (out_type == RowType::kFloat32) {
    return type == out_type ? copy_row<4> : pick_to<float>(type, portable);
  }
  if (out_type == RowType::kFloat16) {
    return type == out_type ? copy_row<2> : pick_to<uint16_t>(type, portable);
  }
  return nullptr;
}

}  // namespace hstu_trt
