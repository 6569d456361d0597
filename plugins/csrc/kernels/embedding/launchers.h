// SPDX-License-Identifier: Apache-2.0
// Lookups in tables of one type, each compiled in a file of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt {

// All columns have the type, and the call is one that embedding_unsupported has nothing against.
cudaError_t lookup_fp32(EmbeddingParams const& params, cudaStream_t stream);
cudaError_t lookup_fp16(EmbeddingParams const& params, cudaStream_t stream);
cudaError_t lookup_bf16(EmbeddingParams const& params, cudaStream_t stream);
cudaError_t lookup_fp8(EmbeddingParams const& params, cudaStream_t stream);
cudaError_t lookup_int8(EmbeddingParams const& params, cudaStream_t stream);

}  // namespace hstu_trt
