// SPDX-License-Identifier: Apache-2.0
// extern "C" face of the layer kernels (kernels/layer/layer.h). Kernels are numbered as in LayerKernel.
#pragma once

#include "capi.h"

namespace hstu_trt {

enum class LayerKernel : int32_t {
  kNormRows = 0,
  kGate = 1,
  kQuantiseRows = 2,
  kEncodeTokens = 3,
  kUserVectors = 4,
  kScores = 5,
  kProject = 6,
};

}  // namespace hstu_trt

extern "C" {

// Bytes of a kernel's params struct; 0 for a number that there is not.
HSTU_TRT_API size_t hstu_trt_layer_params_size(int32_t kernel);

// Points `fields` at the fields of the struct, in their order, and returns their number.
HSTU_TRT_API size_t hstu_trt_layer_params_fields(int32_t kernel, HstuTrtField const** fields);

// nullptr, or why the kernel cannot do a call.
HSTU_TRT_API char const* hstu_trt_layer_unsupported(int32_t kernel, void const* params);

// Returns a cudaError_t.
HSTU_TRT_API int32_t hstu_trt_launch_layer(int32_t kernel, void const* params, void* stream);

}  // extern "C"
