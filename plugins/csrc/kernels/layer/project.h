// SPDX-License-Identifier: Apache-2.0
// The fp8 product on Hopper: what it is cut into, and its launch.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt::project {

constexpr int kColumns = 256;     // of a CTA: an output's width is a multiple
constexpr int kPanelBytes = 128;  // inputs of a stage: their number is a multiple

// sm90_project.cu; only where the library is built for 90a.
cudaError_t launch_sm90(ProjectParams const& params, int multiprocessors, cudaStream_t stream) noexcept;

}  // namespace hstu_trt::project
