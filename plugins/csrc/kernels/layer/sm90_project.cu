// SPDX-License-Identifier: Apache-2.0
#include "project.h"
#include "sm90_project.cuh"

namespace hstu_trt::project {

cudaError_t launch_sm90(ProjectParams const& params, int multiprocessors, cudaStream_t stream) noexcept {
  int columns = 0;
  for (int i = 0; i < params.count; ++i) columns += params.widths[i];
  // A matrix of bytes; the type of its elements is not the copy engine's business.
  auto matrix = [](void const* data, int inputs, int rows, int64_t stride, int box_rows) {
    return TensorMapShape{data,   DataType::kFloat8E4M3, inputs,   rows,       1, stride,
                          stride, kPanelBytes,           box_rows, kPanelBytes};
  };
  CUtensorMap rows_map{}, weight_map{};
  if (!encode_tensor_map(matrix(params.x, params.inputs, params.rows, params.x_stride, kTileRows), rows_map) ||
      !encode_tensor_map(matrix(params.weight, params.inputs, columns, params.inputs, kColumns), weight_map)) {
    return cudaErrorInvalidValue;
  }
  int const bytes = sizeof(SharedMemory);
  cudaError_t const error = cudaFuncSetAttribute(project_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  int const slabs = columns / kColumns;
  int const per_slab = multiprocessors / slabs > 0 ? multiprocessors / slabs : 1;
  int const tiles = (params.rows + kTileRows - 1) / kTileRows;
  unsigned const ctas = static_cast<unsigned>(slabs * (per_slab < tiles ? per_slab : tiles));
  project_kernel<<<ctas, kThreads, bytes, stream>>>(params, rows_map, weight_map);
  return cudaGetLastError();
}

}  // namespace hstu_trt::project
