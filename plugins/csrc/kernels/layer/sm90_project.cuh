// SPDX-License-Identifier: Apache-2.0
// An fp8 product that keeps its weights in shared memory and writes what the attention reads.
//
// A CTA holds 256 columns of the weights, all inputs of them, for the whole launch, and rows of x stream past: 64 rows
// at a time, to two consumer warpgroups in turn. While the tensor cores multiply for one, the other scales, converts
// and stores what it has. One thread of a third warpgroup has the copy engine bring the rows.
#pragma once

#include "../attention/tensor_map.h"
#include "../common/ptx.cuh"
#include "../common/wgmma.cuh"
#include "sm90_project_output.cuh"
#include "sm90_project_tiles.cuh"

namespace hstu_trt::project {

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

// One that stores e4m3 or fp16: two loops, since the compiler would compute what both have in common ahead of the
// branch and run out of registers.
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
