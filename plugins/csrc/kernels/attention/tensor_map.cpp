// SPDX-License-Identifier: Apache-2.0
#include "tensor_map.h"

#include <cuda_runtime_api.h>

namespace hstu_trt {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time: the library then loads where no driver is.
Encode find_encode() noexcept {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaError_t const error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

struct TypeInfo {
  CUtensorMapDataType type;
  int bytes;
};

TypeInfo type_info(DataType type) noexcept {
  switch (type) {
    case DataType::kFloat16: return {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2};
    case DataType::kBFloat16: return {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2};
    case DataType::kFloat32: return {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4};
    default: return {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
  }
}

}  // namespace

bool encode_tensor_map(TensorMapShape const& shape, CUtensorMap& map) noexcept {
  static Encode const encode = find_encode();
  if (!encode) return false;
  // No row, no address, and nobody will load from it.
  if (shape.rows == 0) return true;
  TypeInfo const info = type_info(shape.type);
  // A single row or matrix has no stride to speak of; the driver wants a valid one all the same.
  int64_t const row_stride = shape.rows > 1 ? shape.row_stride : shape.row_elements;
  int64_t const outer_stride = shape.outer > 1 ? shape.outer_stride : shape.row_elements;
  cuuint64_t const sizes[3] = {static_cast<cuuint64_t>(shape.row_elements),
                               static_cast<cuuint64_t>(shape.rows > 0 ? shape.rows : 1),
                               static_cast<cuuint64_t>(shape.outer > 0 ? shape.outer : 1)};
  cuuint64_t const strides[2] = {static_cast<cuuint64_t>(row_stride) * info.bytes,
                                 static_cast<cuuint64_t>(outer_stride) * info.bytes};
  cuuint32_t const box[3] = {static_cast<cuuint32_t>(shape.box_elements), static_cast<cuuint32_t>(shape.box_rows), 1};
  cuuint32_t const steps[3] = {1, 1, 1};
  CUtensorMapSwizzle const swizzle =
      shape.swizzle_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, info.type, 3, const_cast<void*>(shape.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace hstu_trt
