// SPDX-License-Identifier: Apache-2.0
#include "smxx.cuh"

template cudaError_t hstu_trt::smxx::launch<__half>(AttentionParams const&, int, cudaStream_t);
