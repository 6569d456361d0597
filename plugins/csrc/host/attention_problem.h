// SPDX-License-Identifier: Apache-2.0
// One call of HSTU attention on random tokens: as TensorRT's tensors and as AttentionParams.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../kernels/attention/params.h"
#include "device.h"
#include "handles.h"

namespace hstu_trt::host {

struct User {
  int32_t prefix, candidates;
  int32_t queries;  // prefix rows of q, at most `prefix`
};

struct AttentionCase {
  std::string name;
  Type type = Type::kHALF;
  Type output = Type::kHALF;
  int32_t heads = 4, dim = 64;
  std::vector<User> users = {{200, 60, 200}, {0, 5, 0}, {130, 0, 130}, {77, 33, 77}};
  Type offsets = Type::kINT32;
  bool norm_per_user = false;
  bool attn_scale = false;
  bool bias = false;
  int32_t max_attn_len = 0, contextual_seq_len = 0, min_full_attn_seq_len = 0, candidate_group_size = 1;
  double tolerance = 1e-3;  // relative L2 against the fp32 kernel
};

class AttentionProblem {
 public:
  AttentionProblem(AttentionCase const& one, unsigned seed);

  Fields fields() const;
  std::vector<PluginTensorDesc> const& inputs() const { return inputs_; }
  PluginTensorDesc const& output() const { return output_; }
  std::vector<void const*> addresses() const;
  size_t output_bytes() const;

  // Other lengths within the same tensors.
  void set_users(std::vector<User> const& users);
  // Offsets that make no sense.
  void scramble_offsets();

  // For the C face; `out` holds fp32 with `float_output`, else the case's output type.
  AttentionParams params(void* out, bool float_output, void* workspace) const;
  // The fp32 kernel's result on the same tensors.
  std::vector<float> oracle() const;

 private:
  void add(PluginTensorDesc const& tensor, Buffer buffer);
  void add_vector(size_t count, float from, float to);
  void add_bias();
  void write_offsets(std::array<std::vector<int64_t>, 3> const& offsets);

  AttentionCase case_;
  unsigned seed_;
  int32_t query_rows_ = 0, key_rows_ = 0;
  std::vector<PluginTensorDesc> inputs_;
  std::vector<Buffer> buffers_;
  std::vector<Buffer> narrow_offsets_;  // INT32, for the C face
  PluginTensorDesc output_{};
};

}  // namespace hstu_trt::host
