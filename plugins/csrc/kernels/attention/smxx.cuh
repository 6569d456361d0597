// SPDX-License-Identifier: Apache-2.0
// HSTU attention with warp-wide matrix products (mma.sync), for compute capability 8.0 and up: every option, any GPU.
//
// A CTA computes one head of one work item: 128 query rows, dealt to its warps. It walks the item's key tiles, cached
// tokens first, then the prefix rows of this call, then the candidates' own rows; one tile is computed while the next
// arrives. Scores never leave their registers: a warp's S = Q K^T becomes the left operand of SiLU(S) V there. Rows
// that do not exist are zeros in shared memory, so whatever lies behind a user's rows never leaks.
#pragma once

#include "launchers.h"
#include "smxx_load.cuh"
#include "smxx_mask.cuh"
#include "smxx_output.cuh"
#include "smxx_products.cuh"

namespace hstu_trt::smxx {

// Adds one tile to the sums of a warp.
template <class T>
__device__ __forceinline__ void compute_tile(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                             KeyTile tile, Queries<T> const& queries, float half_alpha, uint32_t keys,
                                             uint32_t values, Sums<T>& sums) {
  TileUse const use = tile_use<T>(rows, tile);
  if (use == TileUse::kSkip) return;
  Scores<T> scores;
  multiply_keys<T>(scores, queries, keys);
  if constexpr (T::kBias) add_bias<T>(p, item, rows, tile, half_alpha, scores);
  if (use == TileUse::kMask) mask_scores<T>(p, item, rows, tile, scores);
  multiply_values<T>(sums, scores, half_alpha, values);
}

template <class T>
__device__ __forceinline__ void compute_item(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                             uint32_t memory) {
  Queries<T> queries(memory + (T::kHoldQueries ? 0 : kStages * T::kStageBytes));
  load_queries<T>(p, item, memory + (T::kHoldQueries ? 0 : kStages * T::kStageBytes));
  copies_commit();
  if constexpr (T::kHoldQueries) {
    copies_wait<0>();
    __syncthreads();
    queries.hold();
    __syncthreads();
  }
  auto const load = [&](int step) {
    uint32_t const stage = memory + step % kStages * T::kStageBytes;
    load_tile<T>(p, item, item.tile<T::kKeys>(step), stage, stage + T::kTileBytes);
    copies_commit();
  };

  int const scale_index = p.scale_count > 1 ? item.head : 0;
  float const half_alpha = 0.5f * p.alpha * (T::kFp8 ? p.q_scale[scale_index] * p.k_scale[scale_index] : 1.f);
  Sums<T> sums = {};
  int const tiles = item.tiles;
  if (tiles > 0) load(0);
  for (int step = 0; step < tiles; ++step) {
    // The tile has arrived, and no warp reads the other stage any more.
    copies_wait<0>();
    __syncthreads();
    if (step + 1 < tiles) load(step + 1);
    uint32_t const stage = memory + step % kStages * T::kStageBytes;
    compute_tile<T>(p, item, rows, item.tile<T::kKeys>(step), queries, half_alpha, stage, stage + T::kTileBytes, sums);
  }

  switch (p.output_type) {
    case DataType::kFloat16: return store_sums<T, __half>(p, item, rows, sums);
    case DataType::kBFloat16: return store_sums<T, __nv_bfloat16>(p, item, rows, sums);
    default: return store_sums<T, float>(p, item, rows, sums);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kCtasPerSm) kernel(__grid_constant__ AttentionParams const p) {
#if __CUDA_ARCH__ >= 890 || !defined(__CUDA_ARCH__)
  constexpr bool kRuns = true;
#else
  constexpr bool kRuns = !T::kFp8;
#endif
  if constexpr (kRuns) {
    extern __shared__ __align__(128) uint8_t memory[];
    // In shared memory rather than in every thread's registers: sums and scores need them all.
    __shared__ ItemState item;
    __shared__ WarpRows warps[T::kThreads / 32];
    auto const* const plan = static_cast<PlanHeader const*>(p.workspace);
    int const index = blockIdx.x / p.heads;
    if (index >= plan->num_items) return;
    if (threadIdx.x == 0) {
      auto const* const items = reinterpret_cast<WorkItem const*>(plan + 1);
      item = read_item<T::kKeys>(p, items[index], blockIdx.x % p.heads);
    }
    __syncthreads();
    WarpRows& rows = warps[threadIdx.x / 32];
    find_warp_rows<T>(p, item, rows);
    compute_item<T>(p, item, rows, shared_address(memory));
  }
}

template <class T>
cudaError_t launch_kernel(AttentionParams const& p, cudaStream_t stream) {
  PlanShape const shape = smxx_plan_shape(p);
  int64_t const ctas = static_cast<int64_t>(plan_max_items(p, shape)) * p.heads;
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  auto const function = reinterpret_cast<void const*>(&kernel<T>);
  cudaError_t const error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<AttentionParams*>(&p)};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(ctas)), dim3(T::kThreads), arguments, T::kSharedBytes,
                          stream);
}

// One translation unit each.
template <class Element>
cudaError_t launch(AttentionParams const& p, int dim, cudaStream_t stream) {
  bool const bias = p.position_bias != nullptr;
  switch (dim) {
    case 32:
      return bias ? launch_kernel<Traits<Element, 32, true>>(p, stream)
                  : launch_kernel<Traits<Element, 32, false>>(p, stream);
    case 64:
      return bias ? launch_kernel<Traits<Element, 64, true>>(p, stream)
                  : launch_kernel<Traits<Element, 64, false>>(p, stream);
    case 128:
      return bias ? launch_kernel<Traits<Element, 128, true>>(p, stream)
                  : launch_kernel<Traits<Element, 128, false>>(p, stream);
    case 256:
      return bias ? launch_kernel<Traits<Element, 256, true>>(p, stream)
                  : launch_kernel<Traits<Element, 256, false>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hstu_trt::smxx
