// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernel supports, and which instantiation computes a call.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "launchers.h"
#include "layout.h"
#include "value_blocks.h"

namespace hstu_trt {
namespace {

bool is_dim(int dim) { return dim == 64 || dim == 128 || dim == 256; }

template <class Element>
sm90::Variant const& variant_of(int dim) {
  switch (dim) {
    case 64: return sm90::variant<Element, 64>();
    case 128: return sm90::variant<Element, 128>();
    default: return sm90::variant<Element, 256>();
  }
}

sm90::Variant const& variant_of(AttentionParams const& params) {
  switch (params.type) {
    case DataType::kFloat16: return variant_of<__half>(params.qk_dim);
    case DataType::kBFloat16: return variant_of<__nv_bfloat16>(params.qk_dim);
    default: return variant_of<__nv_fp8_e4m3>(params.qk_dim);
  }
}

char const* cache_unsupported(AttentionParams const& params) {
  if (!params.cached_k.data || !params.page_table) return nullptr;
  bool const fp8 = params.type == DataType::kFloat8E4M3;
  if (fp8 && params.page_size != kValueBlockKeys) return "sm90: pages of an fp8 cache hold 128 tokens, one value block";
  if (params.page_size % 64 != 0) return "sm90: page_size must be a multiple of 64";
  return nullptr;
}

struct Clusters {
  int items = 0, parts = 0;  // CTAs of a cluster; 0: no clusters
};

// Whether a call has few queries over a cache: so few items that each is cut into parts, and that clusters of as many
// CTAs fill the GPU. Says so by the bounds, as if users were alike; lengths may then be anything.
Clusters choose_clusters(AttentionParams const& params, int multiprocessors) {
  constexpr int kItemRows = 2 * kBlockRows;
  if (!params.cached_k.data || params.whole_items || params.qk_dim != 128) return {};
  int64_t const rows = (params.query_rows + params.users - 1) / params.users;
  int64_t const items = (rows + kItemRows - 1) / kItemRows * params.users, work = items * params.heads;
  for (int parts = 2; parts <= 8; parts *= 2) {
    if (work * parts <= multiprocessors && 4 * work * parts >= 3 * multiprocessors) {
      return {static_cast<int>(items), parts};
    }
  }
  return {};
}

}  // namespace

char const* sm90_unsupported(AttentionParams const& params, int capability) noexcept {
  int const bytes = element_bytes(params.type);
  if (capability != 90) return "sm90: runs on compute capability 9.0 (H100, H200, GH200) only";
  if (params.type == DataType::kFloat32) return "sm90: q, k and v are fp16, bf16 or fp8, not fp32";
  if (params.qk_dim != params.v_dim) return "sm90: qk_dim and v_dim must be equal";
  if (!is_dim(params.qk_dim)) return "sm90: head dims are 64, 128 and 256";
  if (!params.causal) return "sm90: attention is causal";
  if (params.position_bias) return "sm90: has no relative attention bias";
  int const group = params.candidate_group_size;
  if (group < 1 || group > 64 || (group & (group - 1)) != 0)
    return "sm90: candidate_group_size is a power of two up to 64";
  if (!is_aligned(params.q, bytes) || !is_aligned(params.k, bytes)) {
    return "sm90: q and k must be 16-byte aligned, their strides multiples of 16 bytes";
  }
  bool const packed = params.type == DataType::kFloat8E4M3;
  if (!packed && !is_aligned(params.v, bytes))
    return "sm90: v must be 16-byte aligned, its strides multiples of 16 bytes";
  if (!is_aligned(params.out, element_bytes(params.output_type))) {
    return "sm90: out must be 16-byte aligned, its strides multiples of 16 bytes";
  }
  if (params.cached_k.data && !(is_aligned(params.cached_k, bytes) && (packed || is_aligned(params.cached_v, bytes)))) {
    return "sm90: the cache must be 16-byte aligned, its strides multiples of 16 bytes";
  }
  return cache_unsupported(params);
}

size_t sm90_workspace_size(AttentionParams const& params) noexcept { return variant_of(params).workspace_size(params); }

bool sm90_has_plan(AttentionParams const& params, int multiprocessors) noexcept {
  return choose_clusters(params, multiprocessors).parts == 0;
}

cudaError_t launch_sm90_plan(AttentionParams const& params, int multiprocessors, cudaStream_t stream) noexcept {
  if (!sm90_has_plan(params, multiprocessors)) return cudaSuccess;
  return variant_of(params).launch_plan(params, multiprocessors, stream);
}

cudaError_t launch_sm90(AttentionParams const& params, int multiprocessors, cudaStream_t stream) noexcept {
  Clusters const clusters = choose_clusters(params, multiprocessors);
  if (clusters.parts == 0) return variant_of(params).launch(params, multiprocessors, stream);
  switch (params.type) {
    case DataType::kFloat16: return sm90::launch_clusters<__half>(params, clusters.items, clusters.parts, stream);
    case DataType::kBFloat16:
      return sm90::launch_clusters<__nv_bfloat16>(params, clusters.items, clusters.parts, stream);
    default: return sm90::launch_clusters<__nv_fp8_e4m3>(params, clusters.items, clusters.parts, stream);
  }
}

}  // namespace hstu_trt
