// SPDX-License-Identifier: Apache-2.0
#include "attention_call.h"

#include <cmath>

#include "../kernels/attention/attention.h"
#include "types.h"

namespace hstu_trt::trt {

using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using Type = nvinfer1::DataType;

namespace {

constexpr size_t kAlignment = 256;

constexpr size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_empty(PluginTensorDesc const& input) { return input.dims.nbDims < 1; }

bool is_offsets(AttentionInput input) {
  return input >= AttentionInput::kQueryOffsets && input <= AttentionInput::kCandidateOffsets;
}

AttentionInput input_number(int32_t number) { return static_cast<AttentionInput>(number); }

constexpr char const* kTypeFaults[kAllInputs] = {
    "q must be FP32, FP16, BF16 or FP8",
    "k must have the type of q",
    "v must have the type of q",
    "query_offsets must be INT32 or INT64",
    "prefix_offsets must be INT32 or INT64",
    "candidate_offsets must be INT32 or INT64",
    "norm must be FP32",
    "q_scale must be FP32",
    "k_scale must be FP32",
    "v_scale must be FP32",
    "attn_scale must be FP32",
    "position_bias must be FP32",
    "time_bias must be FP32",
    "query_timestamps must be INT64",
    "key_timestamps must be INT64",
};

}  // namespace

char const* AttentionAttributes::fault() const noexcept {
  if (!std::isfinite(alpha)) return "alpha must be a finite number";
  if (causal != 0 && causal != 1) return "causal must be 0 or 1";
  if (max_attn_len < 0) return "max_attn_len must not be negative";
  if (contextual_seq_len < 0) return "contextual_seq_len must not be negative";
  if (min_full_attn_seq_len < 0) return "min_full_attn_seq_len must not be negative";
  if (candidate_group_size < 1) return "candidate_group_size must be at least 1";
  switch (static_cast<OnnxType>(output_type)) {
    case OnnxType::kFloat32:
    case OnnxType::kFloat16:
    case OnnxType::kBFloat16: return nullptr;
  }
  return "output_type must be 1 (FP32), 10 (FP16) or 16 (BF16), as ONNX numbers types";
}

bool input_at(PluginTensorDesc const* inputs, int32_t position, int32_t count, AttentionInput& input) noexcept {
  bool const fp8 = inputs[0].type == Type::kFP8;
  input = input_number(position);
  if (position < kRequiredInputs) return true;
  bool const in_place = count == 10 || count == kAllInputs || (count == 11 && (fp8 || is_empty(inputs[7])));
  if (in_place) return true;
  // Moved up: scales where tokens are fp8, then attn_scale or not, then the four of the bias or not.
  int32_t const scales = fp8 ? 3 : 0, rest = count - kRequiredInputs - scales;
  if (rest != 1 && rest != 4 && rest != 5) return false;
  int32_t number = position - kRequiredInputs;
  if (number >= scales) number += 3 - scales + (rest == 4 ? 1 : 0);
  input = input_number(kRequiredInputs + number);
  return true;
}

bool type_fits(AttentionInput input, Type type, Type tokens) noexcept {
  DataType ours;
  switch (input) {
    case AttentionInput::kQ: return convert(type, ours);
    case AttentionInput::kK:
    case AttentionInput::kV: return type == tokens;
    case AttentionInput::kQueryOffsets:
    case AttentionInput::kPrefixOffsets:
    case AttentionInput::kCandidateOffsets: return is_index(type);
    case AttentionInput::kQueryTimestamps:
    case AttentionInput::kKeyTimestamps: return type == Type::kINT64;
    default: return type == Type::kFLOAT;
  }
}

char const* type_fault(AttentionInput input) noexcept { return kTypeFaults[static_cast<int32_t>(input)]; }

char const* AttentionCall::read(AttentionAttributes const& attributes, PluginTensorDesc const* inputs, int32_t count,
                                PluginTensorDesc const& output) noexcept {
  *this = AttentionCall();
  if (count < kRequiredInputs || count > kAllInputs) return "there must be 7 to 15 inputs";
  count_ = count;
  if (char const* const fault = read_tokens(inputs, output)) return fault;
  for (int32_t position = 0; position < count; ++position) {
    AttentionInput input;
    if (!input_at(inputs, position, count, input)) return "the number of inputs fits no choice of optional ones";
    inputs_[position] = input;
    given_[position] = position < kRequiredInputs || !is_empty(inputs[position]);
    if (!given_[position]) continue;
    Type const type = inputs[position].type;
    if (!type_fits(input, type, inputs[0].type)) return type_fault(input);
    if (char const* const fault = read_vector(input, inputs[position].dims)) return fault;
    if (is_offsets(input))
      copy_.wide[position - static_cast<int32_t>(AttentionInput::kQueryOffsets)] = type == Type::kINT64;
  }
  if (output.type != onnx_type(attributes.output_type)) return "the output's type is not output_type";
  convert(inputs[0].type, params_.type);
  convert(output.type, params_.output_type);
  params_.alpha = attributes.alpha;
  params_.causal = attributes.causal;
  params_.max_attn_len = attributes.max_attn_len;
  params_.contextual_seq_len = attributes.contextual_seq_len;
  params_.min_full_attn_seq_len = attributes.min_full_attn_seq_len;
  params_.candidate_group_size = attributes.candidate_group_size;
  return nullptr;
}

char const* AttentionCall::read_tokens(PluginTensorDesc const* inputs, PluginTensorDesc const& output) noexcept {
  Dims const &q = inputs[0].dims, &k = inputs[1].dims, &v = inputs[2].dims, &out = output.dims;
  for (Dims const* dims : {&q, &k, &v, &out}) {
    if (dims->nbDims != 3) return "q, k, v and the output must have three axes: tokens, heads, dim";
    for (int32_t axis = 0; axis < 3; ++axis) {
      if (dims->d[axis] < 0 || dims->d[axis] > INT32_MAX) return "an axis of q, k, v or the output has no valid length";
    }
  }
  if (k.d[0] != v.d[0]) return "k and v must have as many tokens";
  if (k.d[1] != q.d[1] || v.d[1] != q.d[1]) return "q, k and v must have as many heads";
  if (k.d[2] != q.d[2]) return "q and k must have the same dim";
  if (out.d[0] != q.d[0] || out.d[1] != q.d[1] || out.d[2] != v.d[2])
    return "the output must be [tokens of q, heads, dim of v]";
  params_.query_rows = static_cast<int32_t>(q.d[0]);
  params_.key_rows = static_cast<int32_t>(k.d[0]);
  params_.heads = static_cast<int32_t>(q.d[1]);
  params_.qk_dim = static_cast<int32_t>(q.d[2]);
  params_.v_dim = static_cast<int32_t>(v.d[2]);
  for (TokenTensor* tensor : {&params_.q, &params_.k}) *tensor = {nullptr, q.d[1] * q.d[2], q.d[2]};
  for (TokenTensor* tensor : {&params_.v, &params_.out}) *tensor = {nullptr, v.d[1] * v.d[2], v.d[2]};
  return nullptr;
}

// What stands behind q, k and v has one axis.
char const* AttentionCall::read_vector(AttentionInput input, Dims const& dims) noexcept {
  if (input <= AttentionInput::kV) return nullptr;
  if (dims.nbDims != 1 || dims.d[0] < 0 || dims.d[0] > INT32_MAX)
    return "offsets, norm, scales and bias must have one axis";
  auto const length = static_cast<int32_t>(dims.d[0]);
  switch (input) {
    case AttentionInput::kQueryOffsets:
      if (length < 1) return "offsets must have [users + 1] values";
      params_.users = length - 1;
      return nullptr;
    case AttentionInput::kPrefixOffsets:
    case AttentionInput::kCandidateOffsets:
      return length == params_.users + 1 ? nullptr : "the three offsets must have as many values";
    case AttentionInput::kNorm: params_.norm_count = length; return nullptr;
    case AttentionInput::kQScale: params_.scale_count = length; return nullptr;
    case AttentionInput::kKScale:
    case AttentionInput::kVScale:
      return length == params_.scale_count ? nullptr : "q_scale, k_scale and v_scale must have as many values";
    case AttentionInput::kAttnScale: params_.attn_scale_count = length; return nullptr;
    case AttentionInput::kPositionBias: params_.position_bias_count = length; return nullptr;
    case AttentionInput::kTimeBias: params_.time_bias_count = length; return nullptr;
    case AttentionInput::kQueryTimestamps:
      return length == params_.query_rows ? nullptr : "query_timestamps must have a value per token of q";
    case AttentionInput::kKeyTimestamps:
      return length == params_.key_rows ? nullptr : "key_timestamps must have a value per token of k";
    default: return nullptr;
  }
}

void AttentionCall::bind_stand_ins() noexcept {
  void* const address = reinterpret_cast<void*>(kAlignment);
  std::array<void const*, kAllInputs> inputs;
  inputs.fill(address);
  bind(inputs.data(), address, address, /*checked=*/false);
}

void AttentionCall::bind(void const* const* inputs, void* output, void* workspace, bool checked) noexcept {
  for (int32_t position = 0; position < count_; ++position) {
    if (given_[position]) bind_input(inputs_[position], inputs[position]);
  }
  params_.out.data = output;
  auto* const memory = static_cast<unsigned char*>(workspace);
  params_.workspace = memory + align(offsets_copy_size(params_.users));
  needs_copy_ = checked || copy_.wide[0] || copy_.wide[1] || copy_.wide[2];
  if (!needs_copy_) return;
  auto* const copies = reinterpret_cast<int32_t*>(memory);
  int32_t const length = params_.users + 1;
  copy_.from[0] = params_.query_offsets;
  copy_.from[1] = params_.prefix_offsets;
  copy_.from[2] = params_.candidate_offsets;
  copy_.to = copies;
  copy_.users = params_.users;
  copy_.query_rows = params_.query_rows;
  copy_.key_rows = params_.key_rows;
  params_.query_offsets = copies;
  params_.prefix_offsets = copies + length;
  params_.candidate_offsets = copies + 2 * length;
}

void AttentionCall::bind_input(AttentionInput input, void const* address) noexcept {
  void* const tokens = const_cast<void*>(address);
  auto const* const numbers = static_cast<float const*>(address);
  auto const* const offsets = static_cast<int32_t const*>(address);
  auto const* const seconds = static_cast<int64_t const*>(address);
  switch (input) {
    case AttentionInput::kQ: params_.q.data = tokens; break;
    case AttentionInput::kK: params_.k.data = tokens; break;
    case AttentionInput::kV: params_.v.data = tokens; break;
    case AttentionInput::kQueryOffsets: params_.query_offsets = offsets; break;
    case AttentionInput::kPrefixOffsets: params_.prefix_offsets = offsets; break;
    case AttentionInput::kCandidateOffsets: params_.candidate_offsets = offsets; break;
    case AttentionInput::kNorm: params_.norm = numbers; break;
    case AttentionInput::kQScale: params_.q_scale = numbers; break;
    case AttentionInput::kKScale: params_.k_scale = numbers; break;
    case AttentionInput::kVScale: params_.v_scale = numbers; break;
    case AttentionInput::kAttnScale: params_.attn_scale = numbers; break;
    case AttentionInput::kPositionBias: params_.position_bias = numbers; break;
    case AttentionInput::kTimeBias: params_.time_bias = numbers; break;
    case AttentionInput::kQueryTimestamps: params_.query_timestamps = seconds; break;
    case AttentionInput::kKeyTimestamps: params_.key_timestamps = seconds; break;
  }
}

size_t AttentionCall::workspace_size() const noexcept {
  return align(offsets_copy_size(params_.users)) + attention_workspace_size(params_, AttentionKernel::kAuto);
}

}  // namespace hstu_trt::trt
