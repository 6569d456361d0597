// SPDX-License-Identifier: Apache-2.0
// The lookup: bound by memory, so all that counts is how many bytes are on their way.
//
// A warp takes a chunk of up to 32 ids. One lane per id finds where its row lies; then 1 to 32 lanes share a row, as
// many as it has pieces of 16 bytes, and each lane has eight pieces on their way before it stores the first: 4 KB per
// warp. Where tables have rows in host memory, the first CTAs copy those and the others the rest.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../common/ptx.cuh"
#include "launchers.h"
#include "rows.cuh"
#include "sources.cuh"

namespace hstu_trt {
namespace {

constexpr int kWarpSize = 32;
#ifndef EMB_BW
#define EMB_BW 8
#endif
constexpr int kBlockWarps = EMB_BW;
#ifndef EMB_WARPS
#define EMB_WARPS 32
#endif
// Small calls are cut into chunks for this many warps per multiprocessor.
constexpr int kWarpsPerMultiprocessor = EMB_WARPS;
#ifndef EMB_COLD
#define EMB_COLD 32
#endif
// CTAs for rows over the bus: with 8 warps of 4 KB each, many times what the bus can have on its way.
constexpr int kColdBlocks = EMB_COLD;

// Lanes that share a row of so many packs: a power of two.
__host__ __device__ inline int lanes_per_row(int packs) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < packs) lanes *= 2;
  return lanes;
}

// Copies count rows. kRows of each group of lanes are on their way at a time, kSteps packs per lane of each.
template <class T, class Out, int kCount, int kRows, int kSteps>
__device__ __forceinline__ void copy_rows(RowSource const* sources, int count, Out* out, int64_t out_stride, int packs) {
  int const lane = static_cast<int>(threadIdx.x % kWarpSize);
  int const lanes = lanes_per_row(packs), groups = kWarpSize / lanes;
  int const group = lane / lanes, first_pack = lane % lanes;
  for (int begin = group; begin < count; begin += kRows * groups) {
    RowSource source[kRows];
    float scale[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      int const index = begin + k * groups;
      source[k] = index < count ? sources[index] : RowSource{nullptr, nullptr, -1};
      scale[k] = kIsQuantised<T> && source[k].row ? __ldg(source[k].scale) : 0.f;
    }
    for (int first = first_pack; first < packs; first += lanes * kSteps) {
      Pack<T, kCount> stored[kRows][kSteps];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          int const pack = first + s * lanes;
          stored[k][s] = Pack<T, kCount>{};
          if (source[k].row && pack < packs) {
            stored[k][s] = load_row(static_cast<Pack<T, kCount> const*>(source[k].row) + pack);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (source[k].place < 0) continue;
        auto* const to = reinterpret_cast<Pack<Out, kCount>*>(out + static_cast<int64_t>(source[k].place) * out_stride);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          int const pack = first + s * lanes;
          if (pack < packs) store_row(to + pack, convert<Out>(stored[k][s], scale[k]));
        }
      }
    }
  }
}

template <class T, class Out, int kCount, int kRows, int kSteps>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    lookup_kernel(__grid_constant__ EmbeddingParams const p, int chunk, int cold_blocks) {
  __shared__ RowSource sources[kBlockWarps][kWarpSize];
  allow_next_kernel();
  wait_for_previous_kernel();
  EmbeddingColumns const& columns = p.columns[blockIdx.y];
  EmbeddingTable const& table = p.live_tables ? (*p.live_tables)[columns.live_table] : columns.table;
  int64_t const row_bytes = static_cast<int64_t>(columns.dim) * static_cast<int64_t>(sizeof(T));
  int const block = static_cast<int>(blockIdx.x);
  Role const role = cold_blocks == 0 ? Role::kAll : block < cold_blocks ? Role::kCold : Role::kHot;
  int const role_block = role == Role::kHot ? block - cold_blocks : block;
  int const role_blocks = role == Role::kCold ? cold_blocks : static_cast<int>(gridDim.x) - cold_blocks;
  int const warp = static_cast<int>(threadIdx.x) / kWarpSize;
  auto* const out = static_cast<Out*>(p.out) + columns.first;
  int64_t const step = static_cast<int64_t>(role_blocks) * kBlockWarps * chunk;
  int64_t first = (static_cast<int64_t>(role_block) * kBlockWarps + warp) * chunk;
  for (; first < p.count; first += step) {
    int const given = static_cast<int>(min(static_cast<int64_t>(chunk), p.count - first));
    int const own = find_sources(p, columns, table, row_bytes, role, first, given, sources[warp]);
    copy_rows<T, Out, kCount, kRows, kSteps>(sources[warp], own, out, p.out_stride, columns.dim / kCount);
    __syncwarp();
  }
}

// Ids per warp: whole batches of what is on its way at a time, more than one where there are warps enough.
inline int chunk_of(EmbeddingParams const& p, int batch, int multiprocessors) {
#ifdef EMB_CHUNK_BATCHES
  return std::min(kWarpSize, batch * EMB_CHUNK_BATCHES);
#else
  int64_t const warps = static_cast<int64_t>(multiprocessors) * kWarpsPerMultiprocessor;
  int64_t const fair = (p.count * p.column_count + warps - 1) / warps;
  return static_cast<int>(std::clamp<int64_t>((fair + batch - 1) / batch * batch, 1, kWarpSize));
#endif
}

template <class T, class Out, int kCount, int kRows, int kSteps>
cudaError_t launch(EmbeddingParams const& p, int packs, cudaStream_t stream) {
  int device = 0, multiprocessors = 1, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  int const batch = std::min(kWarpSize, kRows * (kWarpSize / lanes_per_row(packs)));
  int const chunk = chunk_of(p, batch, multiprocessors);
  int64_t const ids = static_cast<int64_t>(chunk) * kBlockWarps;
  int const cold_blocks = p.has_cold_rows ? kColdBlocks : 0;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.count + ids - 1) / ids + cold_blocks), p.column_count);
  config.blockDim = dim3(kBlockWarps * kWarpSize);
  config.stream = stream;
  config.attrs = &overlap;
#ifdef EMB_NO_PDL
  config.numAttrs = 0;
#else
  config.numAttrs = major >= 9 ? 1 : 0;
#endif
  return cudaLaunchKernelEx(&config, lookup_kernel<T, Out, kCount, kRows, kSteps>, p, chunk, cold_blocks);
}

bool is_aligned(void const* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Whether all rows of all tables and of the output begin at a multiple of what a Pack is aligned to. Live tables do.
template <class T, class Out, int kCount>
bool fits_packs(EmbeddingParams const& p) {
  constexpr size_t kTo = alignof(Pack<Out, kCount>), kFrom = alignof(Pack<T, kCount>);
  bool fits = is_aligned(p.out, kTo) && p.out_stride % kCount == 0;
  for (int i = 0; i < p.column_count; ++i) {
    EmbeddingColumns const& c = p.columns[i];
    fits = fits && c.dim % kCount == 0 && c.first % kCount == 0;
    if (p.live_tables) continue;
    fits = fits && is_aligned(c.table.hot, kFrom) && is_aligned(c.table.cold, kFrom);
    fits = fits && is_aligned(c.table.overlay, kFrom);
  }
  return fits;
}

template <class T, class Out>
cudaError_t launch_out(EmbeddingParams const& p, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(std::max(sizeof(T), sizeof(Out)));
  int widest = 0;
  for (int i = 0; i < p.column_count; ++i) widest = std::max(widest, p.columns[i].dim);
  if (!fits_packs<T, Out, kCount>(p)) return launch<T, Out, 1, 2, 4>(p, widest, stream);
  int const packs = widest / kCount;
  if (packs <= kWarpSize) return launch<T, Out, kCount, 8, 1>(p, packs, stream);
  if (packs <= 2 * kWarpSize) return launch<T, Out, kCount, 4, 2>(p, packs, stream);
  return launch<T, Out, kCount, 2, 4>(p, packs, stream);
}

template <class T>
cudaError_t launch_type(EmbeddingParams const& p, cudaStream_t stream) {
  switch (p.output_type) {
#ifndef EMB_DEV
    case DataType::kFloat32: return launch_out<T, float>(p, stream);
#endif
    case DataType::kFloat16: return launch_out<T, __half>(p, stream);
#ifndef EMB_DEV
    case DataType::kBFloat16: return launch_out<T, __nv_bfloat16>(p, stream);
#endif
    default: return cudaErrorNotSupported;
  }
}

}  // namespace
}  // namespace hstu_trt
