// SPDX-License-Identifier: Apache-2.0
#include "offsets.h"

namespace hstu_trt {
namespace {

constexpr int kThreads = 256;

__device__ int64_t load(OffsetsCopy const& copy, int which, int index) {
  return copy.wide[which] ? static_cast<int64_t const*>(copy.from[which])[index]
                          : static_cast<int32_t const*>(copy.from[which])[index];
}

// Whether user `user` has a sensible number of rows.
__device__ bool fits(OffsetsCopy const& copy, int user) {
  int64_t rows[3];
  for (int which = 0; which < 3; ++which) {
    int64_t const begin = load(copy, which, user), end = load(copy, which, user + 1);
    if (begin < 0 || end < begin || end > INT32_MAX) return false;
    rows[which] = end - begin;
  }
  return rows[0] <= rows[1];
}

__device__ bool totals_fit(OffsetsCopy const& copy) {
  for (int which = 0; which < 3; ++which) {
    if (load(copy, which, 0) != 0) return false;
  }
  int64_t const candidates = load(copy, 2, copy.users);
  return load(copy, 0, copy.users) + candidates <= copy.query_rows &&
         load(copy, 1, copy.users) + candidates <= copy.key_rows;
}

__global__ void __launch_bounds__(kThreads) copy_offsets_kernel(OffsetsCopy const copy) {
  bool good = threadIdx.x != 0 || totals_fit(copy);
  for (int user = threadIdx.x; user < copy.users; user += kThreads) good = good && fits(copy, user);
  bool const all_good = __syncthreads_and(good);
  int const count = copy.users + 1;
  for (int index = threadIdx.x; index < 3 * count; index += kThreads) {
    copy.to[index] = all_good ? static_cast<int32_t>(load(copy, index / count, index % count)) : 0;
  }
}

}  // namespace

cudaError_t launch_copy_offsets(OffsetsCopy const& copy, cudaStream_t stream) noexcept {
  copy_offsets_kernel<<<1, kThreads, 0, stream>>>(copy);
  return cudaGetLastError();
}

}  // namespace hstu_trt
