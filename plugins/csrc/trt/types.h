// SPDX-License-Identifier: Apache-2.0
// Element types: TensorRT's, ours, and those of ONNX's attribute output_type.
#pragma once

#include <NvInferRuntime.h>

#include "../kernels/common/data_type.h"

namespace hstu_trt::trt {

// Whether the kernels know `type`; if so, by which name.
inline bool convert(nvinfer1::DataType type, DataType& ours) noexcept {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: ours = DataType::kFloat32; return true;
    case nvinfer1::DataType::kHALF: ours = DataType::kFloat16; return true;
    case nvinfer1::DataType::kBF16: ours = DataType::kBFloat16; return true;
    case nvinfer1::DataType::kFP8: ours = DataType::kFloat8E4M3; return true;
    default: return false;
  }
}

// Of TensorProto.DataType in ONNX.
enum class OnnxType : int32_t { kFloat32 = 1, kFloat16 = 10, kBFloat16 = 16 };

// For an output_type that the attributes' fault() has let pass.
inline nvinfer1::DataType onnx_type(int32_t output_type) noexcept {
  switch (static_cast<OnnxType>(output_type)) {
    case OnnxType::kFloat16: return nvinfer1::DataType::kHALF;
    case OnnxType::kBFloat16: return nvinfer1::DataType::kBF16;
    default: return nvinfer1::DataType::kFLOAT;
  }
}

inline bool is_index(nvinfer1::DataType type) noexcept {
  return type == nvinfer1::DataType::kINT32 || type == nvinfer1::DataType::kINT64;
}

}  // namespace hstu_trt::trt
