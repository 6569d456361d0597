// SPDX-License-Identifier: Apache-2.0
// From the last layer's rows to scores: the postprocessor with the item vectors' product, and the end of the head.
#include "layer.h"
#include "rows.cuh"

namespace hstu_trt {
namespace {

constexpr float kL2Eps = 1e-6f;
// The reference's circle: 2 * 3.14, not 2 * pi.
constexpr float kFullCircle = 6.28f;

__device__ int64_t floor_mod(int64_t value, int64_t by) {
  int64_t const rest = value % by;
  return rest < 0 ? rest + by : rest;
}

// cos and sin of the whole units within their period. Seconds are fp32, which is part of the maths.
__device__ float2 time_feature(int64_t timestamp, int64_t unit, int64_t per_period) {
  float const seconds = static_cast<float>(timestamp);
  float const whole = seconds - static_cast<float>(floor_mod(static_cast<int64_t>(seconds), unit));
  int64_t const units = static_cast<int64_t>(rintf(whole / static_cast<float>(unit)));
  float const angle = static_cast<float>(floor_mod(units, per_period)) / static_cast<float>(per_period) * kFullCircle;
  return {cosf(angle), sinf(angle)};
}

template <int kVectors>
__device__ void add_time(Row<kVectors>& x, UserVectorsParams const& p, int64_t timestamp) {
  float2 const hour = time_feature(timestamp, 3600, 24), day = time_feature(timestamp, 86400, 7);
  float const features[4] = {hour.x, hour.y, day.x, day.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Row<kVectors> weight;
    weight.load(p.time_weight + i * p.width, p.width);
    float const feature = features[i];
    x.combine(weight, [=](float value, float w) { return value + feature * w; });
  }
}

template <int kVectors>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) user_vectors(UserVectorsParams const p) {
  int const row = row_of_warp();
  if (row >= p.rows) return;
  Row<kVectors> x;
  x.load(half_row(p.x, row, p.x_stride), p.width);
  if (p.kind == Postprocessor::kL2Norm) {
    float const length = fmaxf(sqrtf(x.squares(0.0f, p.width)), kL2Eps);
    x.combine(x, [=](float value, float) { return value / length; });
  } else {
    if (p.kind == Postprocessor::kTimestamp) add_time(x, p, p.timestamps[row]);
    x.layer_norm(p.gain, p.bias, p.width, p.eps);
  }
  x.round_to_half();
  if (p.users) x.store_half(half_row(p.users, row, p.width), p.width);
  if (p.items) {
    Row<kVectors> item;
    item.load(half_row(p.items, row, p.width), p.width);
    item.layer_norm(p.item_gain, p.item_bias, p.width, p.eps);
    x.multiply(item);
    x.store(p.product, row, 0, p.width);
  }
}

template <int kVectors>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp) scores(ScoresParams const p) {
  int const row = row_of_warp();
  if (row >= p.rows) return;
  Row<kVectors> hidden;
  hidden.load(half_row(p.hidden, row, p.stride), p.width);
  Row<kVectors> y = hidden;
  y.layer_norm(p.gain, p.bias, p.width, p.eps);
  y.combine(hidden, [](float normed, float plain) { return plain * sigmoid(normed); });
  for (int task = 0; task < p.tasks; ++task) {
    Row<kVectors> products;
    products.load(p.weight + static_cast<int64_t>(task) * p.width, p.width);
    products.multiply(y);
    float const logit = products.sum() + p.weight_bias[task];
    if (threadIdx.x % kWarp == 0) {
      p.scores[static_cast<int64_t>(row) * p.tasks + task] = task < p.binary ? 1.0f / (1.0f + expf(-logit)) : logit;
    }
  }
}

}  // namespace

char const* unsupported(UserVectorsParams const& p) noexcept {
  if (char const* const sentence = wrong_shape(p.rows, p.width)) return sentence;
  if (p.items) {
    if (char const* const sentence = wrong_output(p.product)) return sentence;
  }
  if (!is_aligned(p.x, p.x_stride) || !is_aligned(p.users, p.width) || !is_aligned(p.items, p.width)) {
    return "rows must be 16-byte aligned";
  }
  if (p.rows > 0 && !p.x) return "a tensor is missing";
  if (p.rows > 0 && p.kind != Postprocessor::kL2Norm && !(p.gain && p.bias)) return "the norm's weights are missing";
  if (p.rows > 0 && p.kind == Postprocessor::kTimestamp && !(p.time_weight && p.timestamps)) {
    return "timestamps or their weights are missing";
  }
  if (p.rows > 0 && p.items && !(p.item_gain && p.item_bias && p.product.data)) return "the items' norm is missing";
  return nullptr;
}

cudaError_t launch(UserVectorsParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.rows == 0) return cudaSuccess;
  return with_vectors(params.width, [&](auto vectors) {
    user_vectors<vectors.value><<<row_blocks(params.rows), kRowsPerBlock * kWarp, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

char const* unsupported(ScoresParams const& p) noexcept {
  if (char const* const sentence = wrong_shape(p.rows, p.width)) return sentence;
  if (!is_aligned(p.hidden, p.stride)) return "rows must be 16-byte aligned";
  if (p.tasks < 1 || p.binary < 0 || p.binary > p.tasks) return "binary tasks are some of the tasks, at least one";
  bool const there = p.hidden && p.gain && p.bias && p.weight && p.weight_bias && p.scores;
  return p.rows > 0 && !there ? "a tensor is missing" : nullptr;
}

cudaError_t launch(ScoresParams const& params, cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.rows == 0) return cudaSuccess;
  return with_vectors(params.width, [&](auto vectors) {
    scores<vectors.value><<<row_blocks(params.rows), kRowsPerBlock * kWarp, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace hstu_trt
