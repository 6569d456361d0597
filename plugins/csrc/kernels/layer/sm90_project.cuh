// SPDX-License-Identifier: Apache-2.0
// An fp8 product that keeps its weights in shared memory and writes what the attention reads.
//
// A CTA holds 256 columns of the weights, all inputs of them, for the whole launch, and rows of x stream past: 64 rows
// at a time, to two consumer warpgroups in turn. While the tensor cores multiply for one, the other scales, converts
// and stores what it has. One thread of a third warpgroup has the copy engine bring the rows.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../attention/tensor_map.h"
#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "params.h"

namespace hstu_trt::project {

constexpr int kColumns = 256;     // of a CTA
constexpr int kTileRows = 64;     // of a consumer warpgroup's product
constexpr int kPanelBytes = 128;  // inputs of a stage
constexpr int kMostPanels = kMaxProjectInputs / kPanelBytes;
constexpr int kConsumers = 2;
constexpr int kStages = 6;  // of each consumer
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kTurnBarrier = 1;  // named barriers: + consumer

struct SharedMemory {
  alignas(1024) uint8_t weight[kMostPanels][kColumns][kPanelBytes];
  alignas(1024) uint8_t rows[kConsumers][kStages][kTileRows][kPanelBytes];
  alignas(16) float scale[kColumns];
  alignas(16) float bias[kColumns];
  alignas(8) uint64_t weight_full;
  uint64_t full[kConsumers][kStages];
  uint64_t empty[kConsumers][kStages];
};

// The output that the columns of a CTA go to; all of them to one.
struct Target {
  RowsOut out;
  int column;  // first one, in `out`
};

// Which row tiles a CTA takes: first, first + step, ... The consumers take them in turn.
struct Tiles {
  int slab, first, step, count;

  __device__ explicit Tiles(ProjectParams const& p, int columns) {
    int const slabs = columns / kColumns;
    slab = static_cast<int>(blockIdx.x) % slabs;
    first = static_cast<int>(blockIdx.x) / slabs;
    step = static_cast<int>(gridDim.x) / slabs;
    int const tiles = (p.rows + kTileRows - 1) / kTileRows;
    count = first < tiles ? (tiles - first + step - 1) / step : 0;
  }
};

__device__ __forceinline__ int total_columns(ProjectParams const& p) {
  int columns = 0;
#pragma unroll
  for (int i = 0; i < kMaxProjections; ++i) columns += i < p.count ? p.widths[i] : 0;
  return columns;
}

__device__ __forceinline__ Target find_target(ProjectParams const& p, int column) {
  Target target{p.outs[0], column};
  int begin = 0;
#pragma unroll
  for (int i = 1; i < kMaxProjections; ++i) {
    begin += p.widths[i - 1];
    if (i < p.count && column >= begin) target = {p.outs[i], column - begin};
  }
  return target;
}

// ---- the loader ----

__device__ void load(ProjectParams const& p, CUtensorMap const& rows_map, CUtensorMap const& weight_map,
                     SharedMemory& memory, Tiles const& tiles) {
  int const panels = p.inputs / kPanelBytes;
  barrier_arrive_expect(&memory.weight_full, panels * kColumns * kPanelBytes);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    tma_load(memory.weight[panel], &weight_map, &memory.weight_full, panel * kPanelBytes, tiles.slab * kColumns, 0);
  }
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    int const consumer = i % kConsumers;
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      int const loads = i / kConsumers * panels + panel, stage = loads % kStages;
      if (loads >= kStages) barrier_wait(&memory.empty[consumer][stage], (loads / kStages - 1) & 1);
      barrier_arrive_expect(&memory.full[consumer][stage], kTileRows * kPanelBytes);
      tma_load(memory.rows[consumer][stage], &rows_map, &memory.full[consumer][stage], panel * kPanelBytes,
               (tiles.first + i * tiles.step) * kTileRows, 0);
    }
  }
}

// ---- a consumer ----

// Among four neighbouring lanes c: packets[n] is lane c's packet of block n; afterwards packets[n] is lane n's of block c.
__device__ __forceinline__ void transpose(uint32_t (&packets)[4]) {
  bool const odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t& kept = high ? packets[i + 2] : packets[i];
    uint32_t const sent = high ? packets[i] : packets[i + 2];
    uint32_t const got = __shfl_xor_sync(~0u, sent, 2);
    uint32_t const own = kept;
    packets[i] = high ? got : own;      // of the lower lanes
    packets[i + 2] = high ? own : got;  // of the upper lanes
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t const sent = odd ? packets[i] : packets[i + 1];
    uint32_t const got = __shfl_xor_sync(~0u, sent, 1);
    uint32_t const own = odd ? packets[i + 1] : packets[i];
    packets[i] = odd ? got : own;
    packets[i + 1] = odd ? own : got;
  }
}

__device__ __forceinline__ uint32_t pack_half(float2 pair) {
  __half2 const halves = __float22half2_rn(pair);
  return *reinterpret_cast<uint32_t const*>(&halves);
}

__device__ __forceinline__ uint32_t pack_fp8(float2 pair) {
  return __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
}

// Scale and bias of two neighbouring columns of a thread.
struct Columns {
  float2 scale, bias;

  __device__ Columns(SharedMemory const& memory, int block) {
    int const column = 8 * block + static_cast<int>(threadIdx.x) % 4 * 2;
    scale = *reinterpret_cast<float2 const*>(&memory.scale[column]);
    bias = *reinterpret_cast<float2 const*>(&memory.bias[column]);
  }

  // Of the sums of column block `block`, row g + 8 * half.
  __device__ float2 operator()(float const (&sums)[kColumns / 2], int block, int half) const {
    int const i = 4 * block + 2 * half;
    return {sums[i] * scale.x + bias.x, sums[i + 1] * scale.y + bias.y};
  }
};

// The rows g and g + 8 of a warp's 16, and which of them are there.
template <class T>
struct TwoRows {
  T* rows[2];
  bool exists[2];
};

// Stores a thread's sums in e4m3: lane c of four stores 8 elements of every fourth block.
__device__ __forceinline__ void store_fp8(float const (&sums)[kColumns / 2], SharedMemory const& memory,
                                          TwoRows<uint8_t> const& to) {
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    // Scales of later blocks are not to be read ahead: registers are short.
    asm volatile("" ::: "memory");
    uint32_t packets[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      Columns const columns(memory, 4 * group + n);
      packets[0][n] = pack_fp8(columns(sums, 4 * group + n, 0));
      packets[1][n] = pack_fp8(columns(sums, 4 * group + n, 1));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t(&four)[4] = packets[half];
      transpose(four);
      uint2 const bytes{four[0] | four[1] << 16, four[2] | four[3] << 16};
      if (to.exists[half]) *reinterpret_cast<uint2*>(to.rows[half] + 32 * group + 8 * (threadIdx.x % 4)) = bytes;
    }
  }
}

// The same in fp16: even lanes store 4 elements of one block, odd lanes of the next.
__device__ __forceinline__ void store_half(float const (&sums)[kColumns / 2], SharedMemory const& memory,
                                           TwoRows<__half> const& to) {
  bool const odd = threadIdx.x & 1;
#pragma unroll
  for (int block = 0; block < kColumns / 8; block += 2) {
    asm volatile("" ::: "memory");
    Columns const first(memory, block), second(memory, block + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const a = pack_half(first(sums, block, half)), b = pack_half(second(sums, block + 1, half));
      uint32_t const got = __shfl_xor_sync(~0u, odd ? a : b, 1);
      uint2 const four{odd ? got : a, odd ? b : got};
      if (to.exists[half]) *reinterpret_cast<uint2*>(to.rows[half] + 8 * (block + odd) + 2 * (threadIdx.x & 2)) = four;
    }
  }
}

// One that stores e4m3 or fp16: two loops, since the compiler would compute what both have in common ahead of the branch
// and run out of registers.
template <bool kFp8>
class Consumer {
 public:
  __device__ Consumer(ProjectParams const& p, SharedMemory& memory, int number, Target const& target)
      : p_(p), memory_(memory), target_(target), number_(number) {}

  __device__ __forceinline__ void run(Tiles const& tiles) {
    barrier_wait(&memory_.weight_full, 0);
#pragma unroll 1
    for (int i = number_; i < tiles.count; i += kConsumers) {
      // The tensor cores work for one warpgroup at a time, so that the other's stores fall together with its products.
      if (i > 0) named_barrier_sync(kTurnBarrier + number_, 2 * 128);
      multiply();
      if (i + 1 < tiles.count) named_barrier_arrive(kTurnBarrier + 1 - number_, 2 * 128);
      products_wait<0>();
      pin(sums_);
      release_tile();
      store((tiles.first + i * tiles.step) * kTileRows);
    }
  }

 private:
  // Issues the products of a tile; they are in flight on return.
  __device__ __forceinline__ void multiply() {
    int const panels = p_.inputs / kPanelBytes;
    // Not for the sums' sake, which the first product overwrites: the last tile's need not outlive their stores so.
#pragma unroll
    for (float& sum : sums_) sum = 0.0f;
    pin(sums_);
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      int const stage = (loads_ + panel) % kStages;
      barrier_wait(&memory_.full[number_][stage], (loads_ + panel) / kStages & 1);
      products_begin();
      SharedOperand const left = shared_operand(shared_address(memory_.rows[number_][stage]), Swizzle::k128, 1024);
      SharedOperand const right = shared_operand(shared_address(memory_.weight[panel]), Swizzle::k128, 1024);
#pragma unroll
      for (int step = 0; step < kPanelBytes / 32; ++step) {
        Wgmma<__nv_fp8_e4m3, kColumns>::both(sums_, operand_at(left, 32 * step), operand_at(right, 32 * step),
                                             panel + step > 0);
      }
      products_commit();
    }
  }

  // Hands the stages of a tile back to the loader, once its products are there.
  __device__ __forceinline__ void release_tile() {
    for (int panel = 0; panel < p_.inputs / kPanelBytes; ++panel, ++loads_) {
      if (threadIdx.x % 32 == 0) barrier_arrive(&memory_.empty[number_][loads_ % kStages]);
    }
  }

  __device__ __forceinline__ void store(int first_row) {
    int const warp = static_cast<int>(threadIdx.x) % 128 / 32, g = static_cast<int>(threadIdx.x) % 32 / 4;
    int const row = first_row + 16 * warp + g;
    bool const upper = row < p_.rows, lower = row + 8 < p_.rows;
    int64_t const at = row * target_.out.stride + target_.column, below = at + 8 * target_.out.stride;
    if constexpr (kFp8) {
      auto* const to = static_cast<uint8_t*>(target_.out.data);
      store_fp8(sums_, memory_, {{to + at, to + below}, {upper, lower}});
    } else {
      auto* const to = static_cast<__half*>(target_.out.data);
      store_half(sums_, memory_, {{to + at, to + below}, {upper, lower}});
    }
  }

  ProjectParams const& p_;
  SharedMemory& memory_;
  Target target_;
  int number_;
  int loads_ = 0;
  float sums_[kColumns / 2];
};

__device__ void begin(ProjectParams const& p, SharedMemory& memory, Tiles const& tiles, Target const& target) {
  if (threadIdx.x == 0) {
    barrier_init(&memory.weight_full, 1);
    for (int i = 0; i < kConsumers * kStages; ++i) {
      barrier_init(&memory.full[0][0] + i, 1);
      barrier_init(&memory.empty[0][0] + i, 4);
    }
    barrier_init_fence();
  }
  float const inverse = target.out.type == DataType::kFloat8E4M3 ? 1.0f / target.out.scale : 1.0f;
  for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += kThreads) {
    memory.scale[i] = p.column_scale[tiles.slab * kColumns + i] * inverse;
    memory.bias[i] = p.bias[tiles.slab * kColumns + i] * inverse;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1)
    project_kernel(__grid_constant__ ProjectParams const p, __grid_constant__ CUtensorMap const rows_map,
                   __grid_constant__ CUtensorMap const weight_map) {
  extern __shared__ unsigned char raw_memory[];
  auto& memory = *reinterpret_cast<SharedMemory*>(raw_memory);
  Tiles const tiles(p, total_columns(p));
  Target const target = find_target(p, tiles.slab * kColumns);
  begin(p, memory, tiles, target);
  int const warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    registers_shrink<24>();
    if (threadIdx.x == 0) load(p, rows_map, weight_map, memory, tiles);
  } else {
    registers_grow<240>();
    if (target.out.type == DataType::kFloat8E4M3) {
      Consumer<true>(p, memory, warpgroup - 1, target).run(tiles);
    } else {
      Consumer<false>(p, memory, warpgroup - 1, target).run(tiles);
    }
  }
}

}  // namespace hstu_trt::project
