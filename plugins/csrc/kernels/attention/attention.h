// SPDX-License-Identifier: Apache-2.0
// Launchers of HSTU attention and the one predicate that says what they can do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace hstu_trt {

enum class AttentionKernel : int32_t {
  kAuto = 0,     // the first of the list below that supports the call
  kSm90 = 1,     // TMA, wgmma, warp specialised: compute capability 9.0
  kSmxx = 2,     // mma.sync: compute capability 8.0 and up
  kFloat32 = 3,  // plain fp32 arithmetic, one warp per query row and head: the on-device oracle
};

// Compute capabilities that the library is built for, as nvcc names them: "80,90a".
char const* attention_archs() noexcept;

// nullptr if `kernel` supports the call on a device of compute capability `capability` (90 for 9.0), else a sentence
// that names what it does not support. Reads no device memory. kAuto answers for the whole list.
char const* attention_unsupported(AttentionParams const& params, AttentionKernel kernel, int capability) noexcept;

// Bytes of workspace that launch_attention needs for these bounds. Depends on no device memory.
size_t attention_workspace_size(AttentionParams const& params, AttentionKernel kernel) noexcept;

// Enqueues the attention on `stream`: no allocation, no synchronisation, nothing read on the host.
// Returns cudaErrorNotSupported where attention_unsupported has a sentence.
cudaError_t launch_attention(AttentionParams const& params, AttentionKernel kernel, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
