// SPDX-License-Identifier: Apache-2.0
// The lookup: bound by memory, so all that counts is how many bytes are on their way.
//
// A warp takes up to 32 ids, and one lane per id finds where its row lies. Then there are two ways.
//
//   plain    1 to 32 lanes share a row, as many as it has vectors of 16 bytes, and each lane has eight vectors on their
//            way before it stores the first
//   staged   from Hopper on, where rows need no conversion and are vectors of 16 bytes: the copy engine brings all rows
//            of the warp to shared memory and takes them to the output. Rows over the bus and zeros go the plain way.
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
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kPlainWarps = 8;
// Of a staged warp.
constexpr int kStagedRows = 16;
constexpr int64_t kStagedBytes = 16 << 10;
constexpr int64_t kMostStagedBytes = 32 << 10;
// Shared memory that a staged CTA takes and leaves unused, so that fewer CTAs are at work on a multiprocessor: beyond
// what keeps the memory busy, each only opens one more page of it. 289,536 rows of 1 KiB: 206.7 us, 208.2 without.
constexpr int64_t kSpareBytes = 16 << 10;

// Lanes that share a row of so many packs: a power of two.
inline __host__ __device__ int lanes_per_row(int packs) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < packs) lanes *= 2;
  return lanes;
}

// Copies count rows. kRows of each group of lanes are on their way at a time, kSteps packs per lane of each.
template <class T, class Out, int kCount, int kRows, int kSteps>
__device__ __forceinline__ void copy_rows(RowSource const* sources, int count, Out* out, int64_t out_stride,
                                          int packs) {
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
          if (pack < packs) to[pack] = convert<Out>(stored[k][s], scale[k]);
        }
      }
    }
  }
}

inline __device__ EmbeddingTable const& table_of(EmbeddingParams const& p, EmbeddingColumns const& columns) {
  return p.live_tables ? (*p.live_tables)[columns.live_table] : columns.table;
}

template <class T, class Out, int kCount, int kRows, int kSteps>
__global__ void __launch_bounds__(kPlainWarps* kWarpSize)
    plain_kernel(__grid_constant__ EmbeddingParams const p, int rows_per_warp) {
  __shared__ RowSource sources[kPlainWarps][kWarpSize];
  wait_for_previous_kernel();
  EmbeddingColumns const& columns = p.columns[blockIdx.y];
  int const warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int64_t const first = (static_cast<int64_t>(blockIdx.x) * kPlainWarps + warp) * rows_per_warp;
  if (first >= p.count) return;
  int const count = static_cast<int>(min(static_cast<int64_t>(rows_per_warp), p.count - first));
  int64_t const row_bytes = static_cast<int64_t>(columns.dim) * static_cast<int64_t>(sizeof(T));
  FoundRow const own = find_own_row(p, columns, table_of(p, columns), row_bytes, first, count);
  sources[warp][lane] = {own.row, own.scale, static_cast<int32_t>(first + lane)};
  __syncwarp();
  allow_next_kernel();
  auto* const out = static_cast<Out*>(p.out) + columns.first;
  copy_rows<T, Out, kCount, kRows, kSteps>(sources[warp], count, out, p.out_stride, columns.dim / kCount);
}

// ---- the copy engine ----

__device__ __forceinline__ void start_load(uint32_t to, void const* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void start_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

// Shared memory may be given back when the engine has read it.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Zeros, and rows over the bus. A function of its own: most calls have none.
template <class T>
__device__ __noinline__ void copy_plain_rows(EmbeddingParams const& p, EmbeddingColumns const& columns,
                                             RowSource const* sources, int count) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  auto* const out = static_cast<T*>(p.out) + columns.first;
  copy_rows<T, T, kCount, 4, 2>(sources, count, out, p.out_stride, columns.dim / kCount);
}

// One warp per CTA, so that a multiprocessor takes as many as its shared memory holds.
template <class T>
__global__ void __launch_bounds__(kWarpSize)
    staged_kernel(__grid_constant__ EmbeddingParams const p, int rows_per_warp) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char staged[];
  __shared__ RowSource sources[kWarpSize];
  __shared__ __align__(8) uint64_t barrier;
  int const lane = static_cast<int>(threadIdx.x);
  if (lane == 0) {
    barrier_init(&barrier, 1);
    barrier_init_fence();
  }
  __syncwarp();
  wait_for_previous_kernel();
  EmbeddingColumns const& columns = p.columns[blockIdx.y];
  int64_t const first = static_cast<int64_t>(blockIdx.x) * rows_per_warp;
  int const count = static_cast<int>(min(static_cast<int64_t>(rows_per_warp), p.count - first));
  uint32_t const row_bytes = static_cast<uint32_t>(columns.dim) * static_cast<uint32_t>(sizeof(T));
  FoundRow const own = find_own_row(p, columns, table_of(p, columns), row_bytes, first, count);

  bool const is_staged = own.row && !own.is_cold;
  uint32_t const rows = __ballot_sync(kAllLanes, is_staged);
  uint32_t const base = shared_address(staged), own_stage = base + static_cast<uint32_t>(lane) * row_bytes;
  if (lane == 0) barrier_arrive_expect(&barrier, static_cast<uint32_t>(__popc(rows)) * row_bytes);
  __syncwarp();
  if (is_staged) start_load(own_stage, own.row, row_bytes, &barrier);

  bool const is_plain = lane < count && !is_staged;
  uint32_t const plain = __ballot_sync(kAllLanes, is_plain);
  if (plain != 0) {
    if (is_plain) {
      sources[__popc(plain & ((1u << lane) - 1u))] = {own.row, own.scale, static_cast<int32_t>(first + lane)};
    }
    __syncwarp();
    copy_plain_rows<T>(p, columns, sources, __popc(plain));
  }

  barrier_wait(&barrier, 0);
  // Not sooner: CTAs of the next kernel would crowd where there is room first.
  allow_next_kernel();
  T* const out = static_cast<T*>(p.out) + columns.first + first * p.out_stride;
  if (plain == 0 && p.out_stride == columns.dim) {
    if (lane == 0) start_store(out, base, static_cast<uint32_t>(count) * row_bytes);
  } else if (is_staged) {
    start_store(out + lane * p.out_stride, own_stage, row_bytes);
  }
  wait_for_stores();
#endif
}

// ---- launches ----

template <class Kernel>
cudaError_t launch(Kernel* kernel, EmbeddingParams const& p, int rows_per_warp, int warps, size_t shared_bytes,
                   bool overlaps, cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  int64_t const rows = static_cast<int64_t>(rows_per_warp) * warps;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.count + rows - 1) / rows), static_cast<unsigned>(p.column_count));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarpSize));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, rows_per_warp);
}

bool is_aligned(void const* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Whether all rows of all tables begin at a multiple of `from` bytes, and those of the output at one of `to` bytes and
// kCount elements. Live tables are aligned.
template <int kCount>
bool fits(EmbeddingParams const& p, size_t element_bytes, size_t from, size_t to) {
  bool result = is_aligned(p.out, to) && p.out_stride % kCount == 0;
  for (int i = 0; i < p.column_count; ++i) {
    EmbeddingColumns const& c = p.columns[i];
    result = result && c.dim % kCount == 0 && c.first % kCount == 0 && c.dim * element_bytes % from == 0;
    if (p.live_tables) continue;
    result = result && is_aligned(c.table.hot, from) && is_aligned(c.table.cold, from);
    result = result && is_aligned(c.table.overlay, from);
  }
  return result;
}

template <class T, class Out, int kCount, int kRows, int kSteps>
cudaError_t launch_ways(EmbeddingParams const& p, int widest, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  bool const is_hopper = major >= 9;
  int64_t const row_bytes = static_cast<int64_t>(widest) * static_cast<int64_t>(sizeof(T));
  if constexpr (kCount > 1 && std::is_same_v<T, Out>) {
    if (is_hopper && row_bytes <= kMostStagedBytes && fits<kCount>(p, sizeof(T), kVectorBytes, kVectorBytes)) {
      int const rows = static_cast<int>(std::clamp<int64_t>(kStagedBytes / row_bytes, 1, kStagedRows));
      int64_t const bytes = std::min(rows * row_bytes + kSpareBytes, kMostStagedBytes);
      return launch(staged_kernel<T>, p, rows, 1, static_cast<size_t>(bytes), true, stream);
    }
  }
  int const rows = std::min(kWarpSize, kRows * (kWarpSize / lanes_per_row(widest / kCount)));
  return launch(plain_kernel<T, Out, kCount, kRows, kSteps>, p, rows, kPlainWarps, 0, is_hopper, stream);
}

template <class T, class Out>
cudaError_t launch_out(EmbeddingParams const& p, cudaStream_t stream) {
  constexpr int kCount = kVectorBytes / static_cast<int>(std::max(sizeof(T), sizeof(Out)));
  int widest = 0;
  for (int i = 0; i < p.column_count; ++i) widest = std::max(widest, p.columns[i].dim);
  if (!fits<kCount>(p, sizeof(T), alignof(Pack<T, kCount>), alignof(Pack<Out, kCount>))) {
    return launch_ways<T, Out, 1, 2, 4>(p, widest, stream);
  }
  int const packs = widest / kCount;
  if (packs <= kWarpSize) return launch_ways<T, Out, kCount, 8, 1>(p, widest, stream);
  if (packs <= 2 * kWarpSize) return launch_ways<T, Out, kCount, 4, 2>(p, widest, stream);
  return launch_ways<T, Out, kCount, 2, 4>(p, widest, stream);
}

template <class T>
cudaError_t launch_type(EmbeddingParams const& p, cudaStream_t stream) {
  switch (p.output_type) {
    case DataType::kFloat32: return launch_out<T, float>(p, stream);
    case DataType::kBFloat16: return launch_out<T, __nv_bfloat16>(p, stream);
    case DataType::kFloat16: return launch_out<T, __half>(p, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace
}  // namespace hstu_trt
