// SPDX-License-Identifier: Apache-2.0
// From TensorRT's tensors to AttentionParams: which input is which, and whether types and shapes go together.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "../kernels/attention/offsets.h"
#include "../kernels/attention/params.h"

namespace hstu_trt::trt {

// Attributes of the op, with the names and defaults of contract/ops.py.
struct AttentionAttributes {
  float alpha = 1.f;
  int32_t causal = 1;
  int32_t max_attn_len = 0;
  int32_t contextual_seq_len = 0;
  int32_t min_full_attn_seq_len = 0;
  int32_t candidate_group_size = 1;
  int32_t output_type = 1;

  template <class Self, class Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visitor("alpha", self.alpha);
    visitor("causal", self.causal);
    visitor("max_attn_len", self.max_attn_len);
    visitor("contextual_seq_len", self.contextual_seq_len);
    visitor("min_full_attn_seq_len", self.min_full_attn_seq_len);
    visitor("candidate_group_size", self.candidate_group_size);
    visitor("output_type", self.output_type);
  }
  template <class Visitor>
  static void visit_announced(AttentionAttributes const& self, Visitor& visitor) {
    visit(self, visitor);
  }

  char const* fault() const noexcept;
};

// Inputs of the op in their order; those from kQScale on are optional.
enum class AttentionInput : int32_t {
  kQ,
  kK,
  kV,
  kQueryOffsets,
  kPrefixOffsets,
  kCandidateOffsets,
  kNorm,
  kQScale,
  kKScale,
  kVScale,
  kAttnScale,
  kPositionBias,
  kTimeBias,
  kQueryTimestamps,
  kKeyTimestamps,
};
constexpr int32_t kRequiredInputs = 7;
constexpr int32_t kAllInputs = 15;

// Which of the op's inputs stands at `position` of `count`. An optional input that a node leaves empty is either passed
// as a tensor without axes, and all others stand where the op has them; or it was left out, and the rest moved up.
// `inputs` are looked at up to `position`. Returns false where `count` makes no sense.
bool input_at(nvinfer1::PluginTensorDesc const* inputs, int32_t position, int32_t count,
              AttentionInput& input) noexcept;

// Whether an input may have a type; `tokens` is the type of q.
bool type_fits(AttentionInput input, nvinfer1::DataType type, nvinfer1::DataType tokens) noexcept;

// The sentence for an input that has another.
char const* type_fault(AttentionInput input) noexcept;

// One call: parameters with everything that shapes and types say, then with addresses.
class AttentionCall {
 public:
  // Returns a sentence if the tensors do not go together, else nullptr.
  char const* read(AttentionAttributes const& attributes, nvinfer1::PluginTensorDesc const* inputs, int32_t count,
                   nvinfer1::PluginTensorDesc const& output) noexcept;

  // Addresses that nobody may read, aligned as TensorRT aligns its tensors: for questions before there are tensors.
  void bind_stand_ins() noexcept;

  // `checked`: the offsets are copied and checked (kernels/attention/offsets.h). INT64 offsets always are.
  void bind(void const* const* inputs, void* output, void* workspace, bool checked) noexcept;

  // Bytes for the offsets' copies and the kernels. For shapes that bound those of all calls.
  size_t workspace_size() const noexcept;

  // What has to be launched before the attention, where `needs_copy`.
  bool needs_copy() const noexcept { return needs_copy_; }
  OffsetsCopy const& offsets_copy() const noexcept { return copy_; }
  AttentionParams const& params() const noexcept { return params_; }

 private:
  char const* read_tokens(nvinfer1::PluginTensorDesc const* inputs, nvinfer1::PluginTensorDesc const& output) noexcept;
  char const* read_vector(AttentionInput input, nvinfer1::Dims const& dims) noexcept;
  void bind_input(AttentionInput input, void const* address) noexcept;

  std::array<AttentionInput, kAllInputs> inputs_{};
  std::array<bool, kAllInputs> given_{};
  int32_t count_ = 0;
  bool needs_copy_ = false;
  OffsetsCopy copy_{};
  AttentionParams params_{};
};

}  // namespace hstu_trt::trt
