// SPDX-License-Identifier: Apache-2.0
// Tile sizes and shared memory of the mma.sync kernel, per element type and head width.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "plan.h"
#include "value_blocks.h"

namespace hstu_trt::smxx {

constexpr int kSlots = 2;                   // row blocks per work item
constexpr int kRows = kSlots * kBlockRows;  // query rows of a CTA
constexpr int kStages = 2;                  // tiles of K and V in shared memory: one computed, one in flight
constexpr int kMaxDim = 256;

// Head width that q, k and v are padded to with zeros. One width for all three: where qk_dim and v_dim differ, the
// products on the padding cost less than three times as many kernels would.
constexpr int padded_dim(int qk_dim, int v_dim) {
  int const dim = qk_dim > v_dim ? qk_dim : v_dim;
  return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Keys per tile. Halves of width 256 take half the keys: shared memory of 99 KiB (compute capability 8.6, 8.9, 12.0)
// then still holds both stages.
constexpr int tile_keys(int element_bytes, int dim) { return element_bytes * dim > 256 ? 32 : 64; }

template <class Element_, int kDim_, bool kBias_>
struct Traits {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kBias = kBias_;
  static constexpr bool kFp8 = sizeof(Element) == 1;
  static constexpr int kKeys = tile_keys(sizeof(Element), kDim);

  // A warp of 32 rows reads K and V from shared memory half as often per product as one of 16; it holds kDim sums and
  // kKeys scores per thread. Bias needs registers of its own, and is bound by its arithmetic.
  static constexpr int kWarpRows = kDim == 256 || kBias ? 16 : 32;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kThreads = kRows / kWarpRows * 32;
  static constexpr int kCtasPerSm = kThreads == 128 ? 2 : kDim <= 64 ? 2 : 1;

  static constexpr int kRowBytes = kDim * sizeof(Element);        // of q and k, and of v but for fp8
  static constexpr int kDimSteps = kRowBytes / 32;                // products that make a score
  static constexpr int kKeySteps = kKeys * sizeof(Element) / 32;  // products that add a tile to a sum
  // Values: [kKeys][kDim], or a piece of a value block, [kDim][kKeys].
  static constexpr int kValueRows = kFp8 ? kDim : kKeys;
  static constexpr int kValueRowBytes = kFp8 ? kKeys : kRowBytes;

  // Queries stay in registers where there is room; they then arrive in the memory of the first tiles.
  static constexpr bool kHoldQueries = kDim != 128;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + (kHoldQueries ? 0 : kQueryBytes);

  static_assert(!kHoldQueries || kQueryBytes <= kStages * kStageBytes, "queries arrive in the memory of the tiles");
  static_assert(kValueBlockKeys % kKeys == 0, "a tile of fp8 values lies within a value block");
  static_assert(kBlockRows % kWarpRows == 0, "a warp's rows are of one block");
};

}  // namespace hstu_trt::smxx
