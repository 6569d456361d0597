// SPDX-License-Identifier: Apache-2.0
// The kernels behind the dispatch table.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "plan.h"

namespace hstu_trt {

namespace sm90 {

struct Variant {
  size_t (*workspace_size)(AttentionParams const&);
  cudaError_t (*launch_plan)(AttentionParams const&, int multiprocessors, cudaStream_t);
  cudaError_t (*launch)(AttentionParams const&, int multiprocessors, cudaStream_t);
};

// One translation unit each.
template <class Element, int kDim>
Variant const& variant();

// For few queries over a cache, head width 128: clusters of `parts` CTAs, 2, 4 or 8, for `items` items of all heads.
// There may be more or fewer items. No plan, no workspace.
template <class Element>
cudaError_t launch_clusters(AttentionParams const& params, int items, int parts, cudaStream_t stream);

}  // namespace sm90

// Every kernel answers why it cannot run a call (nullptr: it can), how much workspace it needs, builds its plan and
// launches. `v` of fp8 calls comes as value blocks, but for launch_fp32.
char const* sm90_unsupported(AttentionParams const& params, int capability) noexcept;
size_t sm90_workspace_size(AttentionParams const& params) noexcept;
// Whether a call goes by a plan.
bool sm90_has_plan(AttentionParams const& params, int multiprocessors) noexcept;
cudaError_t launch_sm90_plan(AttentionParams const& params, int multiprocessors, cudaStream_t stream) noexcept;
cudaError_t launch_sm90(AttentionParams const& params, int multiprocessors, cudaStream_t stream) noexcept;

char const* smxx_unsupported(AttentionParams const& params, int capability) noexcept;
PlanShape smxx_plan_shape(AttentionParams const& params) noexcept;
cudaError_t launch_smxx(AttentionParams const& params, cudaStream_t stream) noexcept;

char const* fp32_unsupported(AttentionParams const& params) noexcept;
cudaError_t launch_fp32(AttentionParams const& params, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
