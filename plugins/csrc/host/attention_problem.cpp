// SPDX-License-Identifier: Apache-2.0
#include "attention_problem.h"

#include "../capi/capi.h"

namespace hstu_trt::host {
namespace {

constexpr int32_t kFloat32Kernel = 3;
constexpr int64_t kPositions = 512, kBuckets = 64;

DataType kernel_type(Type type) {
  switch (type) {
    case Type::kHALF: return DataType::kFloat16;
    case Type::kBF16: return DataType::kBFloat16;
    case Type::kFP8: return DataType::kFloat8E4M3;
    default: return DataType::kFloat32;
  }
}

int32_t onnx_number(Type type) { return type == Type::kHALF ? 10 : type == Type::kBF16 ? 16 : 1; }

std::array<std::vector<int64_t>, 3> offsets_of(std::vector<User> const& users) {
  std::array<std::vector<int64_t>, 3> offsets;
  for (auto& one : offsets) one.push_back(0);
  for (User const& user : users) {
    offsets[0].push_back(offsets[0].back() + user.queries);
    offsets[1].push_back(offsets[1].back() + user.prefix);
    offsets[2].push_back(offsets[2].back() + user.candidates);
  }
  return offsets;
}

}  // namespace

AttentionProblem::AttentionProblem(AttentionCase const& one, unsigned seed) : case_(one), seed_(seed) {
  auto const offsets = offsets_of(one.users);
  query_rows_ = static_cast<int32_t>(offsets[0].back() + offsets[2].back());
  key_rows_ = static_cast<int32_t>(offsets[1].back() + offsets[2].back());
  for (int64_t const rows : {query_rows_, key_rows_, key_rows_}) {
    PluginTensorDesc const tokens = tensor({rows, one.heads, one.dim}, one.type);
    auto const count = static_cast<size_t>(rows * one.heads * one.dim);
    add(tokens, upload(random_values(count, seed_ + static_cast<unsigned>(inputs_.size())), one.type));
  }
  auto const length = static_cast<int64_t>(one.users.size() + 1);
  for (int i = 0; i < 3; ++i) {
    add(tensor({length}, one.offsets), Buffer(static_cast<size_t>(length) * element_bytes(one.offsets)));
    narrow_offsets_.emplace_back(static_cast<size_t>(length) * sizeof(int32_t));
  }
  write_offsets(offsets);
  add_vector(one.norm_per_user ? one.users.size() : 1, 50.f, 300.f);
  if (one.type == Type::kFP8) {
    for (int i = 0; i < 3; ++i) add_vector(static_cast<size_t>(one.heads), .5f, 1.5f);
  }
  if (one.attn_scale) add_vector(static_cast<size_t>(query_rows_), .002f, .02f);
  if (one.bias) add_bias();
  output_ = tensor({query_rows_, one.heads, one.dim}, one.output);
}

void AttentionProblem::add(PluginTensorDesc const& desc, Buffer buffer) {
  inputs_.push_back(desc);
  buffers_.push_back(std::move(buffer));
}

void AttentionProblem::add_vector(size_t count, float from, float to) {
  std::vector<float> values = random_values(count, seed_ + 100 + static_cast<unsigned>(inputs_.size()));
  for (float& value : values) value = from + (to - from) * std::abs(std::sin(value));
  add(tensor({static_cast<int64_t>(count)}, Type::kFLOAT), Buffer(values));
}

void AttentionProblem::add_bias() {
  add_vector(2 * kPositions - 1, -1.f, 1.f);
  add_vector(kBuckets + 1, -1.f, 1.f);
  for (int64_t const rows : {query_rows_, key_rows_}) {
    std::vector<int64_t> seconds(static_cast<size_t>(rows));
    for (size_t i = 0; i < seconds.size(); ++i) seconds[i] = 1'700'000'000 + static_cast<int64_t>(i) * 977;
    add(tensor({rows}, Type::kINT64), Buffer(seconds));
  }
}

Fields AttentionProblem::fields() const {
  return Fields()
      .add("alpha", 1.f / std::sqrt(static_cast<float>(case_.dim)))
      .add("causal", 1)
      .add("max_attn_len", case_.max_attn_len)
      .add("contextual_seq_len", case_.contextual_seq_len)
      .add("min_full_attn_seq_len", case_.min_full_attn_seq_len)
      .add("candidate_group_size", case_.candidate_group_size)
      .add("output_type", onnx_number(case_.output));
}

std::vector<void const*> AttentionProblem::addresses() const {
  std::vector<void const*> result;
  for (Buffer const& buffer : buffers_) result.push_back(buffer.data());
  return result;
}

size_t AttentionProblem::output_bytes() const {
  return static_cast<size_t>(query_rows_) * static_cast<size_t>(case_.heads * case_.dim) * element_bytes(case_.output);
}

void AttentionProblem::set_users(std::vector<User> const& users) { write_offsets(offsets_of(users)); }

void AttentionProblem::write_offsets(std::array<std::vector<int64_t>, 3> const& offsets) {
  for (size_t i = 0; i < 3; ++i) {
    std::vector<int32_t> const narrow(offsets[i].begin(), offsets[i].end());
    narrow_offsets_[i].write(narrow);
    if (case_.offsets == Type::kINT64)
      buffers_[3 + i].write(offsets[i]);
    else
      buffers_[3 + i].write(narrow);
  }
}

void AttentionProblem::scramble_offsets() {
  std::mt19937_64 generator(seed_);
  for (size_t i = 3; i < 6; ++i) {
    std::vector<int64_t> values(case_.users.size() + 1);
    for (int64_t& value : values) value = static_cast<int64_t>(generator());
    if (case_.offsets == Type::kINT64)
      buffers_[i].write(values);
    else
      buffers_[i].write(std::vector<int32_t>(values.begin(), values.end()));
  }
}

AttentionParams AttentionProblem::params(void* out, bool float_output, void* workspace) const {
  auto const at = [this](size_t index) { return buffers_[index].data(); };
  auto const vector = [&](size_t index) { return static_cast<float const*>(at(index)); };
  TokenTensor tokens{nullptr, int64_t{case_.heads} * case_.dim, case_.dim};
  auto const rows = [&](void* data) { return TokenTensor{data, tokens.row_stride, tokens.head_stride}; };
  AttentionParams p{};
  p.q = rows(at(0)), p.k = rows(at(1)), p.v = rows(at(2)), p.out = rows(out);
  p.query_offsets = static_cast<int32_t const*>(narrow_offsets_[0].data());
  p.prefix_offsets = static_cast<int32_t const*>(narrow_offsets_[1].data());
  p.candidate_offsets = static_cast<int32_t const*>(narrow_offsets_[2].data());
  p.norm = vector(6);
  p.norm_count = static_cast<int32_t>(inputs_[6].dims.d[0]);
  size_t next = 7;
  if (case_.type == Type::kFP8) {
    p.q_scale = vector(7), p.k_scale = vector(8), p.v_scale = vector(9);
    p.scale_count = case_.heads;
    next = 10;
  }
  if (case_.attn_scale) p.attn_scale = vector(next++), p.attn_scale_count = query_rows_;
  if (case_.bias) {
    p.position_bias = vector(next), p.time_bias = vector(next + 1);
    p.position_bias_count = 2 * kPositions - 1, p.time_bias_count = kBuckets + 1;
    p.query_timestamps = static_cast<int64_t const*>(at(next + 2));
    p.key_timestamps = static_cast<int64_t const*>(at(next + 3));
  }
  p.workspace = workspace;
  p.users = static_cast<int32_t>(case_.users.size());
  p.heads = case_.heads;
  p.qk_dim = p.v_dim = case_.dim;
  p.query_rows = query_rows_, p.key_rows = key_rows_;
  p.type = kernel_type(case_.type);
  p.output_type = float_output ? DataType::kFloat32 : kernel_type(case_.output);
  p.alpha = 1.f / std::sqrt(static_cast<float>(case_.dim));
  p.causal = 1;
  p.max_attn_len = case_.max_attn_len;
  p.contextual_seq_len = case_.contextual_seq_len;
  p.min_full_attn_seq_len = case_.min_full_attn_seq_len;
  p.candidate_group_size = case_.candidate_group_size;
  return p;
}

std::vector<float> AttentionProblem::oracle() const {
  Buffer const out(static_cast<size_t>(query_rows_) * static_cast<size_t>(case_.heads * case_.dim) * sizeof(float));
  AttentionParams const p = params(out.data(), /*float_output=*/true, nullptr);
  must(static_cast<cudaError_t>(hstu_trt_launch_attention(&p, kFloat32Kernel, nullptr)));
  must(cudaDeviceSynchronize());
  return out.read<float>();
}

}  // namespace hstu_trt::host
