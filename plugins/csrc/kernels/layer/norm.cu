// SPDX-License-Identifier: Apache-2.0
// Layer norms of rows, with what is done to a row just before or behind: residual sum, swish, product. Bound by memory:
// each row is read and written once, by one warp.
#include "layer.h"
#include "rows.cuh"

namespace hstu_trt {
namespace {

template <int kVectors>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) norm_rows(NormRowsParams const p) {
  int const row = row_of_warp();
  if (row >= p.rows) return;
  Row<kVectors> x;
  x.load(half_row(p.x, row, p.x_stride), p.width);
  if (p.delta) {
    Row<kVectors> delta;
    delta.load(half_row(p.delta, row, p.delta_stride), p.width);
    x.add(delta);
    x.round_to_half();
    x.store_half(half_row(p.sum, row, p.sum_stride), p.width);
  }
  Row<kVectors> y = x;
  y.layer_norm(p.gain, p.bias, p.width, p.eps);
  if (p.swish) y.combine(x, [](float normed, float plain) { return plain * sigmoid(normed); });
  if (p.factor) {
    x.load(half_row(p.factor, row, p.factor_stride), p.width);
    y.multiply(x);
  }
  y.store(p.out, row, 0, p.width);
}

__global__ void __launch_bounds__(kRowsPerBlock* kWarp) quantise_rows(QuantiseRowsParams const p) {
  QuantiseSegment const& segment = p.segments[blockIdx.y];
  int const row = row_of_warp();
  if (row >= segment.rows) return;
  // A row of q, k or v may be wider than what other kernels keep in registers: in pieces.
  constexpr int kPiece = 2 * kWarp * kVector;
  for (int column = 0; column < segment.width; column += kPiece) {
    Row<2> x;
    int const width = min(kPiece, segment.width - column);
    x.load(static_cast<__half const*>(half_row(segment.x, row, segment.x_stride)) + column, width);
    x.store(segment.out, row, column, width);
  }
}

}  // namespace

char const* unsupported(NormRowsParams const& p) noexcept {
  if (char const* const sentence = wrong_shape(p.rows, p.width)) return sentence;
  if (char const* const sentence = wrong_output(p.out)) return sentence;
  if (!is_aligned(p.x, p.x_stride) || !is_aligned(p.delta, p.delta_stride) || !is_aligned(p.sum, p.sum_stride) ||
      !is_aligned(p.factor, p.factor_stride)) {
    return "rows must be 16-byte aligned";
  }
  if (p.rows > 0 && !(p.x && p.gain && p.bias && p.out.data)) return "a tensor is missing";
  if (p.delta && !p.sum) return "a sum needs a place";
  if (p.swish && p.factor) return "swish and a factor exclude each other";
  return nullptr;
}

cudaError_t launch(NormRowsParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.rows == 0) return cudaSuccess;
  return with_vectors(params.width, [&](auto vectors) {
    norm_rows<vectors.value><<<row_blocks(params.rows), kRowsPerBlock * kWarp, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

char const* unsupported(QuantiseRowsParams const& p) noexcept {
  if (p.count < 1 || p.count > 3) return "1 to 3 segments at a time";
  for (int i = 0; i < p.count; ++i) {
    QuantiseSegment const& segment = p.segments[i];
    if (segment.rows < 0 || segment.width < kVector || segment.width % kVector) return "a width is a multiple of 8";
    if (char const* const sentence = wrong_output(segment.out)) return sentence;
    if (!is_aligned(segment.x, segment.x_stride)) return "rows must be 16-byte aligned";
    if (segment.rows > 0 && !(segment.x && segment.out.data)) return "a tensor is missing";
  }
  return nullptr;
}

cudaError_t launch(QuantiseRowsParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  int rows = 0;
  for (int i = 0; i < params.count; ++i) rows = params.segments[i].rows > rows ? params.segments[i].rows : rows;
  if (rows == 0) return cudaSuccess;
  dim3 const grid(row_blocks(rows), static_cast<unsigned>(params.count));
  quantise_rows<<<grid, kRowsPerBlock * kWarp, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace hstu_trt
