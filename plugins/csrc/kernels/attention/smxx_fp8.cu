// SPDX-License-Identifier: Apache-2.0
#include "smxx.cuh"

template cudaError_t hstu_trt::smxx::launch<__nv_fp8_e4m3>(AttentionParams const&, int, cudaStream_t);
