// SPDX-License-Identifier: Apache-2.0
// Launchers of the layer kernels. `unsupported` answers nullptr, or a sentence that names what a kernel cannot do.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt {

char const* unsupported(NormRowsParams const& params) noexcept;
char const* unsupported(GateParams const& params) noexcept;
char const* unsupported(QuantiseRowsParams const& params) noexcept;
char const* unsupported(EncodeTokensParams const& params) noexcept;
char const* unsupported(UserVectorsParams const& params) noexcept;
char const* unsupported(ScoresParams const& params) noexcept;
char const* unsupported(ProjectParams const& params) noexcept;

// Each enqueues one kernel on `stream`: no allocation, nothing read on the host. cudaErrorNotSupported where
// `unsupported` has a sentence.
cudaError_t launch(NormRowsParams const& params, cudaStream_t stream) noexcept;
cudaError_t launch(GateParams const& params, cudaStream_t stream) noexcept;
cudaError_t launch(QuantiseRowsParams const& params, cudaStream_t stream) noexcept;
cudaError_t launch(EncodeTokensParams const& params, cudaStream_t stream) noexcept;
cudaError_t launch(UserVectorsParams const& params, cudaStream_t stream) noexcept;
cudaError_t launch(ScoresParams const& params, cudaStream_t stream) noexcept;
// Compute capability 9.0 alone.
cudaError_t launch(ProjectParams const& params, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
