// SPDX-License-Identifier: Apache-2.0
// The lookup: bound by memory, so all that counts is how many bytes are on their way.
//
// A warp takes up to 32 ids, and one lane per id finds where its row lies. Then there are two ways.
//
//   staged   from Hopper on, where rows are 16-byte vectors: the copy engine brings all rows of the warp to shared
//            memory, and takes them to the output if they need no conversion
//   plain    1 to 32 lanes share a row, as many as it has vectors, and each lane has eight vectors on their way before
//            it stores the first. Rows over the bus and rows of zeros always go this way.
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
#ifndef EMB_R
#define EMB_R 16
#endif
#ifndef EMB_KB
#define EMB_KB 16
#endif
#ifndef EMB_PAD
#define EMB_PAD 0
#endif
// Of a staged warp. More rows leave multiprocessors without work in small calls.
constexpr int kStagedRows = EMB_R;
constexpr int64_t kStagedBytes = EMB_KB << 10;
constexpr int64_t kMostStagedBytes = 48 << 10;

// Lanes that share a row of so many packs: a power of two.
__host__ inline __device__ int lanes_per_row(int packs) {
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
  allow_next_kernel();
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
  auto* const out = static_cast<Out*>(p.out) + columns.first;
  copy_rows<T, Out, kCount, kRows, kSteps>(sources[warp], count, out, p.out_stride, columns.dim / kCount);
}

// ---- the copy engine ----

__device__ __forceinline__ void start_row_load(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier) {
#ifdef EMB_HINT
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
#endif
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

// Staged rows to the output, converted; `rows` has a bit for each.
template <class T, class Out, int kCount>
__device__ __forceinline__ void convert_staged(unsigned char const* staged, uint32_t rows, float own_scale,
                                               int64_t row_bytes, Out* out, int64_t out_stride, int packs) {
  int const lane = static_cast<int>(threadIdx.x % kWarpSize);
  int const lanes = lanes_per_row(packs), groups = kWarpSize / lanes;
  int const group = lane / lanes, first_pack = lane % lanes;
#pragma unroll 4
  for (int begin = 0; begin < kWarpSize; begin += groups) {
    if (rows >> begin == 0) break;
    int const row = begin + group;
    float const scale = __shfl_sync(kAllLanes, own_scale, row);
    if ((rows >> row & 1u) == 0) continue;
    auto const* const from = reinterpret_cast<Pack<T, kCount> const*>(staged + row * row_bytes);
    auto* const to = reinterpret_cast<Pack<Out, kCount>*>(out + row * out_stride);
#pragma unroll 2
    for (int pack = first_pack; pack < packs; pack += lanes) to[pack] = convert<Out>(from[pack], scale);
  }
}

// One warp per CTA, so that a multiprocessor takes as many as its shared memory holds.
template <class T, class Out, int kCount, int kRows, int kSteps>
__global__ void __launch_bounds__(kWarpSize)
    staged_kernel(__grid_constant__ EmbeddingParams const p, int rows_per_warp) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char staged[];
  __shared__ RowSource sources[kWarpSize];
  __shared__ __align__(8) uint64_t barrier;
  int const lane = static_cast<int>(threadIdx.x);
  allow_next_kernel();
  if (lane == 0) {
    barrier_init(&barrier, 1);
    barrier_init_fence();
  }
  wait_for_previous_kernel();
  EmbeddingColumns const& columns = p.columns[blockIdx.y];
  int64_t const first = static_cast<int64_t>(blockIdx.x) * rows_per_warp;
  int const count = static_cast<int>(min(static_cast<int64_t>(rows_per_warp), p.count - first));
  int64_t const row_bytes = static_cast<int64_t>(columns.dim) * static_cast<int64_t>(sizeof(T));
  FoundRow const own = find_own_row(p, columns, table_of(p, columns), row_bytes, first, count);

  // Everything that the engine brings, in one go.
#ifdef EMB_COLD_BULK
  bool const is_staged = own.row;
#else
  bool const is_staged = own.row && !own.is_cold;
#endif
  uint32_t const rows = __ballot_sync(kAllLanes, is_staged);
  uint32_t const base = shared_address(staged), own_stage = base + static_cast<uint32_t>(lane * row_bytes);
  if (lane == 0) barrier_arrive_expect(&barrier, __popc(rows) * static_cast<uint32_t>(row_bytes));
  __syncwarp();
  if (is_staged) start_row_load(own_stage, own.row, static_cast<uint32_t>(row_bytes), shared_address(&barrier));
  float const own_scale = kIsQuantised<T> && own.scale ? __ldg(own.scale) : 0.f;

  // Meanwhile, rows over the bus and zeros.
  auto* const out = static_cast<Out*>(p.out) + columns.first + first * p.out_stride;
  bool const is_plain = lane < count && !is_staged;
  uint32_t const plain = __ballot_sync(kAllLanes, is_plain);
  if (plain != 0) {
    if (is_plain) sources[__popc(plain & ((1u << lane) - 1u))] = {own.row, own.scale, lane};
    __syncwarp();
    copy_rows<T, Out, kCount, kRows, kSteps>(sources, __popc(plain), out, p.out_stride, columns.dim / kCount);
  }

  barrier_wait(&barrier, 0);
  if constexpr (!std::is_same_v<T, Out>) {
    convert_staged<T, Out, kCount>(staged, rows, own_scale, row_bytes, out, p.out_stride, columns.dim / kCount);
  } else if (plain == 0 && p.out_stride == columns.dim) {
    if (lane == 0) start_store(out, base, static_cast<uint32_t>(count * row_bytes));
    wait_for_stores();
  } else {
    if (is_staged) start_store(out + lane * p.out_stride, own_stage, static_cast<uint32_t>(row_bytes));
    wait_for_stores();
  }
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
  if constexpr (kCount > 1) {
    if (is_hopper && row_bytes <= kMostStagedBytes && fits<kCount>(p, sizeof(T), kVectorBytes, kVectorBytes)) {
      int const rows = static_cast<int>(std::clamp<int64_t>(kStagedBytes / row_bytes, 1, kStagedRows));
      return launch(staged_kernel<T, Out, kCount, kRows, kSteps>, p, rows, 1,
                    static_cast<size_t>(rows * row_bytes) + EMB_PAD, true, stream);
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
#ifndef EMB_DEV
    case DataType::kFloat32: return launch_out<T, float>(p, stream);
    case DataType::kBFloat16: return launch_out<T, __nv_bfloat16>(p, stream);
#endif
    case DataType::kFloat16: return launch_out<T, __half>(p, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace
}  // namespace hstu_trt
