// SPDX-License-Identifier: Apache-2.0
#include "lookup.cuh"

namespace hstu_trt {

cudaError_t lookup_int8(EmbeddingParams const& params, cudaStream_t stream) {
  return launch_type<int8_t>(params, stream);
}

}  // namespace hstu_trt
