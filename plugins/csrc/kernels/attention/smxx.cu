// SPDX-License-Identifier: Apache-2.0
// What the mma.sync kernel supports, and which instantiation computes a call.
#include <climits>

#include "launchers.h"
#include "layout.h"
#include "smxx_traits.cuh"

namespace hstu_trt {

namespace smxx {

template <class Element>
cudaError_t launch(AttentionParams const& params, int dim, cudaStream_t stream);

namespace {

// Rows are copied 16 bytes at a time, and addressed by 32-bit strides.
bool can_copy(TokenTensor const& tensor, int bytes) {
  return is_aligned(tensor, bytes) && tensor.row_stride * bytes <= INT_MAX;
}

char const* layout_unsupported(AttentionParams const& p) {
  int const bytes = element_bytes(p.type);
  bool const fp8 = p.type == DataType::kFloat8E4M3;
  if (!can_copy(p.q, bytes) || !can_copy(p.k, bytes) || (!fp8 && !can_copy(p.v, bytes))) {
    return "smxx: q, k and v must be 16-byte aligned, their strides multiples of 16 bytes below 2 GiB";
  }
  if (!can_copy(p.out, element_bytes(p.output_type))) {
    return "smxx: out must be 16-byte aligned, its strides multiples of 16 bytes";
  }
  if (!p.cached_k.data) return nullptr;
  if (!can_copy(p.cached_k, bytes) || (!fp8 && !can_copy(p.cached_v, bytes))) {
    return "smxx: the cache must be 16-byte aligned, its strides multiples of 16 bytes below 2 GiB";
  }
  if (p.page_table && fp8 && p.page_size != kValueBlockKeys) {
    return "smxx: pages of an fp8 cache hold 128 tokens, one value block";
  }
  if (p.page_table && (p.page_size < 1 || (p.page_size & (p.page_size - 1)) != 0)) {
    return "smxx: page_size must be a power of two";
  }
  return nullptr;
}

}  // namespace
}  // namespace smxx

char const* smxx_unsupported(AttentionParams const& p, int capability) noexcept {
  bool const fp8 = p.type == DataType::kFloat8E4M3;
  if (capability < 80) return "smxx: runs on compute capability 8.0 and up";
  if (fp8 && capability < 89) return "smxx: fp8 needs compute capability 8.9 or more";
  if (p.type == DataType::kFloat32) return "smxx: q, k and v are fp16, bf16 or fp8, not fp32";
  if (p.output_type == DataType::kFloat8E4M3) return "smxx: the output must be fp32, fp16 or bf16";
  int const granule = fp8 ? 16 : 8;
  if (p.qk_dim < 1 || p.v_dim < 1 || p.qk_dim > smxx::kMaxDim || p.v_dim > smxx::kMaxDim || p.qk_dim % granule != 0 ||
      p.v_dim % 8 != 0) {
    return "smxx: head dims are multiples of 8 (qk_dim of fp8: 16) up to 256";
  }
  if (!p.causal) return "smxx: attention is causal";
  if (p.candidate_group_size < 1) return "smxx: candidate_group_size must be at least 1";
  if (p.position_bias && p.cached_offsets) return "smxx: relative bias and cached keys do not go together";
  return smxx::layout_unsupported(p);
}

PlanShape smxx_plan_shape(AttentionParams const& p) noexcept {
  int const keys = smxx::tile_keys(smxx::padded_dim(p.qk_dim, p.v_dim));
  // One tile stands for all of the candidates' own: the kernel knows how many they are.
  return {smxx::kSlots, keys, 1, false};
}

cudaError_t launch_smxx(AttentionParams const& p, cudaStream_t stream) noexcept {
  int const dim = smxx::padded_dim(p.qk_dim, p.v_dim);
  switch (p.type) {
    case DataType::kFloat16: return smxx::launch<__half>(p, dim, stream);
    case DataType::kBFloat16: return smxx::launch<__nv_bfloat16>(p, dim, stream);
    case DataType::kFloat8E4M3: return smxx::launch<__nv_fp8_e4m3>(p, dim, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace hstu_trt
