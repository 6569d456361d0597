// SPDX-License-Identifier: Apache-2.0
// Launchers of the embedding lookup, and the predicate that says what it can do.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace hstu_trt {

// nullptr if the call is supported, else a sentence that names what is not. Reads no device memory.
char const* embedding_unsupported(EmbeddingParams const& params) noexcept;

// Enqueues the lookup on `stream`: no allocation, no synchronisation, nothing read on the host. One launch if all
// columns have one type, else one per type; with `latch`, a small one before them.
// Returns cudaErrorNotSupported where embedding_unsupported has a sentence.
cudaError_t launch_embedding_lookup(EmbeddingParams const& params, cudaStream_t stream) noexcept;

// Enqueues the exchange of what `live_tables` points at: launches behind it on `stream` see `tables`, those before it
// what was there. Other streams see one or the other; launches with a latch see one of them, whole.
cudaError_t launch_embedding_publish(EmbeddingTable const** live_tables, EmbeddingTable const* tables,
                                     cudaStream_t stream) noexcept;

}  // namespace hstu_trt
