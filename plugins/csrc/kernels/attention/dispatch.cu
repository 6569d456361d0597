// SPDX-License-Identifier: Apache-2.0
// The dispatch table: which kernel computes a call, and what every kernel asks of it.
#include <algorithm>
#include <cstdint>

#include "../common/device.h"
#include "attention.h"
#include "launchers.h"
#include "value_blocks.h"

#ifndef HSTU_TRT_CUDA_ARCHS
#error "the build names its compute capabilities: -DHSTU_TRT_CUDA_ARCHS=..."
#endif

namespace hstu_trt {
namespace {

constexpr size_t kAlignment = 256;

size_t align(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Whether the library holds machine code for a GPU. "90a" runs on 9.0 alone, "80" on all of 8.x.
bool is_built_for(int capability) {
  for (char const* at = HSTU_TRT_CUDA_ARCHS; *at;) {
    int arch = 0;
    for (; *at >= '0' && *at <= '9'; ++at) arch = 10 * arch + *at - '0';
    bool const exact = *at == 'a';
    if (exact ? arch == capability : arch / 10 == capability / 10 && arch <= capability) return true;
    while (*at && (*at < '0' || *at > '9')) ++at;
  }
  return false;
}

// What no kernel accepts.
char const* invalid(AttentionParams const& p) {
  if (p.users < 0 || p.query_rows < 0 || p.key_rows < 0 || p.cached_rows < 0)
    return "users and rows must not be negative";
  if (p.heads < 1 || p.qk_dim < 1 || p.v_dim < 1) return "heads, qk_dim and v_dim must be at least 1";
  if (p.users > 0 && !(p.query_offsets && p.prefix_offsets && p.candidate_offsets))
    return "an offsets tensor is missing";
  if (!p.norm && !p.attn_scale) return "either norm or attn_scale is needed";
  if (!p.attn_scale && p.norm_count != 1 && p.norm_count != p.users) return "norm must have 1 or [users] values";
  if (p.attn_scale && p.attn_scale_count != 1 && p.attn_scale_count != p.query_rows) {
    return "attn_scale must have 1 or [query_rows] values";
  }
  if (p.max_attn_len < 0 || p.contextual_seq_len < 0 || p.min_full_attn_seq_len < 0) {
    return "max_attn_len, contextual_seq_len and min_full_attn_seq_len must not be negative";
  }
  if (p.candidate_group_size < 1) return "candidate_group_size must be at least 1";
  if (p.output_type == DataType::kFloat8E4M3) return "the output is fp16, bf16 or fp32";
  if (p.type == DataType::kFloat8E4M3) {
    if (!(p.q_scale && p.k_scale && p.v_scale)) return "fp8 needs q_scale, k_scale and v_scale";
    if (p.scale_count != 1 && p.scale_count != p.heads) return "fp8 scales must have 1 or [heads] values";
  } else if (p.packed_values || p.scale_count != 0) {
    return "value blocks and scales belong to fp8";
  }
  bool const any_bias = p.position_bias || p.time_bias || p.query_timestamps || p.key_timestamps;
  bool const all_bias = p.position_bias && p.time_bias && p.query_timestamps && p.key_timestamps;
  if (any_bias && !all_bias) return "relative bias needs both tables and both timestamps";
  if (all_bias && (p.position_bias_count < 1 || p.time_bias_count < 1)) return "a bias table must have an entry";
  if (!!p.cached_k.data != !!p.cached_v.data) return "a cache needs keys and values";
  if (p.cached_k.data && !p.cached_offsets) return "a cache needs cached_offsets";
  if (!p.cached_k.data && (p.cached_offsets || p.page_table)) return "cached_offsets or a page table, but no cache";
  if (p.page_table && (p.page_size < 1 || p.pages_per_user < 1))
    return "a page table needs page_size and pages_per_user";
  return nullptr;
}

// Tensor cores take fp8 values as blocks; the oracle takes them either way.
bool needs_packing(AttentionParams const& params, AttentionKernel kernel) {
  return params.type == DataType::kFloat8E4M3 && !params.packed_values && kernel != AttentionKernel::kFloat32;
}

// Token-major values are packed four columns at a time.
bool can_pack(AttentionParams const& params) {
  int64_t const all =
      params.v.row_stride | params.v.head_stride | params.v_dim | reinterpret_cast<intptr_t>(params.v.data);
  return all % 4 == 0;
}

char const* kernel_unsupported(AttentionParams const& params, AttentionKernel kernel, int capability) {
  if (needs_packing(params, kernel) && !can_pack(params)) {
    return "fp8 values that are not packed must be 4-byte aligned, v_dim and their strides multiples of 4";
  }
  switch (kernel) {
    case AttentionKernel::kSm90: return sm90_unsupported(params, capability);
    case AttentionKernel::kSmxx: return smxx_unsupported(params, capability);
    default: return fp32_unsupported(params);
  }
}

#ifndef HSTU_TRT_SM90
}  // namespace

// A library for other GPUs has the sentence alone.
char const* sm90_unsupported(AttentionParams const&, int) noexcept { return "sm90: this library was built without it"; }
size_t sm90_workspace_size(AttentionParams const&) noexcept { return 0; }
bool sm90_has_plan(AttentionParams const&, int) noexcept { return false; }
cudaError_t launch_sm90_plan(AttentionParams const&, int, cudaStream_t) noexcept { return cudaErrorNotSupported; }
cudaError_t launch_sm90(AttentionParams const&, int, cudaStream_t) noexcept { return cudaErrorNotSupported; }

namespace {
#endif

constexpr AttentionKernel kByPreference[] = {AttentionKernel::kSm90, AttentionKernel::kSmxx, AttentionKernel::kFloat32};

// The sentence of the last kernel of the list answers for all.
char const* choose_for_any_build(AttentionParams const& params, AttentionKernel& kernel, int capability) {
  if (char const* sentence = invalid(params)) return sentence;
  if (kernel != AttentionKernel::kAuto) return kernel_unsupported(params, kernel, capability);
  char const* sentence = nullptr;
  for (AttentionKernel candidate : kByPreference) {
    sentence = kernel_unsupported(params, candidate, capability);
    kernel = candidate;
    if (!sentence) return nullptr;
  }
  return sentence;
}

char const* choose(AttentionParams const& params, AttentionKernel& kernel, int capability) {
  if (char const* sentence = choose_for_any_build(params, kernel, capability)) return sentence;
  if (is_built_for(capability)) return nullptr;
  return "built for compute capability " HSTU_TRT_CUDA_ARCHS " only: this GPU takes another `make plugins ARCHS=...`";
}

size_t kernel_workspace_size(AttentionParams const& params, AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kSm90: return align(sm90_workspace_size(params));
    case AttentionKernel::kSmxx: return align(plan_size(params, smxx_plan_shape(params)));
    default: return 0;
  }
}

cudaError_t launch_kernel_plan(AttentionParams const& params, AttentionKernel kernel, int multiprocessors,
                               cudaStream_t stream) {
  switch (kernel) {
    case AttentionKernel::kSm90: return launch_sm90_plan(params, multiprocessors, stream);
    case AttentionKernel::kSmxx:
      return launch_plan(params, smxx_plan_shape(params), multiprocessors, nullptr, 0, stream);
    default: return cudaSuccess;
  }
}

size_t packed_bytes(AttentionParams const& params) {
  return size_t{2} * value_blocks(params.key_rows, params.users) * params.heads * params.v_dim * kValueBlockKeys;
}

}  // namespace

char const* attention_archs() noexcept { return HSTU_TRT_CUDA_ARCHS; }

char const* attention_unsupported(AttentionParams const& params, AttentionKernel kernel, int capability) noexcept {
  return choose(params, kernel, capability);
}

size_t attention_workspace_size(AttentionParams const& params, AttentionKernel kernel) noexcept {
  size_t bytes = 0;
  for (AttentionKernel one : kByPreference) {
    if (kernel != AttentionKernel::kAuto && kernel != one) continue;
    // What no GPU would choose for this call needs no room: 9.0 supports all that others do.
    if (kernel == AttentionKernel::kAuto && kernel_unsupported(params, one, 90)) continue;
    size_t const packed = needs_packing(params, one) ? packed_bytes(params) : 0;
    bytes = std::max(bytes, kernel_workspace_size(params, one) + packed);
  }
  return bytes;
}

cudaError_t launch_attention(AttentionParams const& params, AttentionKernel kernel, cudaStream_t stream) noexcept {
  Device device;
  if (cudaError_t const error = current_device(device); error != cudaSuccess) return error;
  if (choose(params, kernel, device.capability)) return cudaErrorNotSupported;
  if (params.users == 0 || params.query_rows == 0) return cudaSuccess;
  bool const needs_workspace = attention_workspace_size(params, kernel) > 0;
  if (needs_workspace && (!params.workspace || reinterpret_cast<uintptr_t>(params.workspace) % kAlignment != 0)) {
    return cudaErrorInvalidValue;
  }
  if (!params.reuse_plan) {
    cudaError_t const error = launch_kernel_plan(params, kernel, device.multiprocessors, stream);
    if (error != cudaSuccess) return error;
  }
  AttentionParams call = params;
  if (needs_packing(params, kernel)) {
    void* const blocks = static_cast<unsigned char*>(params.workspace) + kernel_workspace_size(params, kernel);
    bool const has_plan = kernel != AttentionKernel::kSm90 || sm90_has_plan(params, device.multiprocessors);
    bool const behind_plan = has_plan && !params.reuse_plan && device.capability >= 90;
    cudaError_t const error = launch_pack_values(params, blocks, behind_plan, stream);
    if (error != cudaSuccess) return error;
    call.v = {blocks, kValueBlockKeys, int64_t{kValueBlockKeys} * params.v_dim};
    call.packed_values = 1;
  }
  switch (kernel) {
    case AttentionKernel::kSm90: return launch_sm90(call, device.multiprocessors, stream);
    case AttentionKernel::kSmxx: return launch_smxx(call, stream);
    default: return launch_fp32(call, stream);
  }
}

}  // namespace hstu_trt
