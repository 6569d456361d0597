// SPDX-License-Identifier: Apache-2.0
// Tile sizes and shared memory of the fp8 product, and which rows and columns a CTA computes.
#pragma once

#include "params.h"
#include "project.h"

namespace hstu_trt::project {

constexpr int kTileRows = 64;  // of a consumer warpgroup's product
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

}  // namespace hstu_trt::project
