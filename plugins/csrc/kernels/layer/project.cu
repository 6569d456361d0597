// SPDX-License-Identifier: Apache-2.0
// What the fp8 product can do, and its launch where the GPU has the kernel.
#include "../common/device.h"
#include "layer.h"
#include "project.h"
#include "rows.cuh"

namespace hstu_trt {

char const* unsupported(ProjectParams const& p) noexcept {
  if (p.count < 1 || p.count > kMaxProjections) return "1 to 4 outputs";
  if (p.rows < 0) return "the number of rows must not be negative";
  if (p.inputs < project::kPanelBytes || p.inputs > kMaxProjectInputs || p.inputs % project::kPanelBytes) {
    return "the inputs are a multiple of 128, up to 512";
  }
  for (int i = 0; i < p.count; ++i) {
    if (p.widths[i] < project::kColumns || p.widths[i] % project::kColumns)
      return "an output's width is a multiple of 256";
    if (char const* const sentence = wrong_output(p.outs[i])) return sentence;
    if (p.rows > 0 && !p.outs[i].data) return "an output is missing";
  }
  if (!is_aligned(p.x, p.x_stride / 2) || !is_aligned(p.weight, 0) || p.x_stride % 16)
    return "rows must be 16-byte aligned";
  if (p.rows > 0 && !(p.x && p.weight && p.column_scale && p.bias)) return "a tensor is missing";
  return nullptr;
}

cudaError_t launch(ProjectParams const& params, [[maybe_unused]] cudaStream_t stream) noexcept {
  if (unsupported(params)) return cudaErrorNotSupported;
  if (params.rows == 0) return cudaSuccess;
#ifdef HSTU_TRT_SM90
  Device device;
  if (cudaError_t const error = current_device(device); error != cudaSuccess) return error;
  if (device.capability == 90) return project::launch_sm90(params, device.multiprocessors, stream);
#endif
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace hstu_trt
