// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt::project {

// sm90_project.cu; only where the library is built for 90a.
cudaError_t launch_sm90(ProjectParams const& params, int multiprocessors, cudaStream_t stream) noexcept;

}  // namespace hstu_trt::project
