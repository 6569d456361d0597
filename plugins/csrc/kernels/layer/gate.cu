// SPDX-License-Identifier: Apache-2.0
// Behind the attention: norm, gate and the left operand of the output product in one pass.
#include "layer.h"
#include "rows.cuh"

namespace hstu_trt {
namespace {

// Norms each head by itself; a vector of 8 elements never crosses a head.
template <int kVectors>
__device__ void group_norm(Row<kVectors>& row, GateParams const& p) {
  int const head_width = p.width / p.heads;
  for (int head = 0; head < p.heads; ++head) {
    auto of_head = [&](int at) { return at >= head * head_width && at < (head + 1) * head_width; };
    float sum = 0.0f, squares = 0.0f;
    row.each(p.width, [&](int vector, int at) {
      for (int i = 0; of_head(at) && i < kVector; ++i) sum += row.values[vector][i];
    });
    float const mean = warp_sum(sum) / head_width;
    row.each(p.width, [&](int vector, int at) {
      for (int i = 0; of_head(at) && i < kVector; ++i) {
        float const difference = row.values[vector][i] - mean;
        squares += difference * difference;
      }
    });
    float const scale = rsqrtf(warp_sum(squares) / head_width + p.eps) * p.gain[head];
    row.each(p.width, [&](int vector, int at) {
      for (int i = 0; of_head(at) && i < kVector; ++i) {
        row.values[vector][i] = (row.values[vector][i] - mean) * scale + p.bias[head];
      }
    });
  }
}

template <int kVectors, bool kGroupNorm>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) gate(GateParams const p) {
  int const row = row_of_warp();
  if (row >= p.rows) return;
  Row<kVectors> u, attention;
  u.load(half_row(p.u, row, p.u_stride), p.width);
  attention.load(half_row(p.attention, row, p.attention_stride), p.width);
  u.combine(u, [](float x, float) { return x * sigmoid(x); });
  u.store(p.joined, row, 0, p.width);
  if (!p.keep_attention) attention.store(p.joined, row, p.width, p.width);
  if constexpr (kGroupNorm) {
    group_norm(attention, p);
  } else {
    attention.layer_norm(p.gain, p.bias, p.width, p.eps);
  }
  attention.multiply(u);
  attention.store(p.joined, row, 2 * p.width, p.width);
}

}  // namespace

char const* unsupported(GateParams const& p) noexcept {
  if (char const* const sentence = wrong_shape(p.rows, p.width)) return sentence;
  if (char const* const sentence = wrong_output(p.joined)) return sentence;
  if (!is_aligned(p.u, p.u_stride) || !is_aligned(p.attention, p.attention_stride))
    return "rows must be 16-byte aligned";
  if (p.heads < 1 || p.width % p.heads || p.width / p.heads % kVector) return "a head's width is a multiple of 8";
  if (p.rows > 0 && !(p.u && p.attention && p.gain && p.bias && p.joined.data)) return "a tensor is missing";
  if (p.keep_attention && p.joined.type != DataType::kFloat16) return "attention that is in place is fp16";
  return nullptr;
}

cudaError_t launch(GateParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.rows == 0) return cudaSuccess;
  return with_vectors(params.width, [&](auto vectors) {
    auto* const kernel = params.group_norm ? gate<vectors.value, true> : gate<vectors.value, false>;
    kernel<<<row_blocks(params.rows), kRowsPerBlock * kWarp, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace hstu_trt
