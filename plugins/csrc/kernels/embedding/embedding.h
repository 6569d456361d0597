// SPDX-License-Identifier: Apache-2.0
// Launcher of the embedding lookup, and the predicate that says what it can do.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt {

// nullptr if the call is supported, else a sentence that names what is not. Reads no device memory.
char const* embedding_unsupported(EmbeddingParams const& params) noexcept;

// Enqueues the lookup on `stream`: no allocation, no synchronisation, nothing read on the host.
// Returns cudaErrorNotSupported where embedding_unsupported has a sentence.
cudaError_t launch_embedding_lookup(EmbeddingParams const& params, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
