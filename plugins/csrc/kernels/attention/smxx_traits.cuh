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

// Keys per tile. Width 256 takes half of them: both stages then fit into 99 KiB of shared memory (compute capability
// 8.6, 8.9, 12.0), and the scores into registers.
constexpr int tile_keys(int dim) { return dim == 256 ? 32 : 64; }

// A warp of 32 rows reads K and V from shared memory half as often per product as one of 16, but holds twice the sums
// and scores. Bias needs registers of its own, and fp8 too where products take it as halves (9.0, 10.0).
constexpr int warp_rows(int element_bytes, int dim, bool bias) {
  return dim == 256 || bias || (element_bytes == 1 && dim == 128) ? 16 : 32;
}

// As many as run side by side without spilled registers: one CTA's products hide the others' SiLU.
constexpr int ctas_per_sm(int element_bytes, int dim, int rows) {
  if (rows == 16) return dim == 32 ? 2 : 1;
  return element_bytes == 1 || dim == 128 ? 2 : 3;
}

template <class Element_, int kDim_, bool kBias_, int kWarpRows_ = warp_rows(sizeof(Element_), kDim_, kBias_),
          int kCtasPerSm_ = ctas_per_sm(sizeof(Element_), kDim_, kWarpRows_)>
struct Traits {
  using Element = Element_;
  static constexpr int kDim = kDim_;
  static constexpr bool kBias = kBias_;
  static constexpr bool kFp8 = sizeof(Element) == 1;
  static constexpr int kKeys = tile_keys(kDim);
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kCtasPerSm = kCtasPerSm_;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kThreads = kRows / kWarpRows * 32;

  static constexpr int kRowBytes = kDim * sizeof(Element);        // of q and k, and of v but for fp8
  static constexpr int kDimSteps = kRowBytes / 32;                // products that make a score
  static constexpr int kKeySteps = kKeys * sizeof(Element) / 32;  // products that add a tile to a sum
  // Values: [kKeys][kDim], or a piece of a value block, [kDim][kKeys].
  static constexpr int kValueRows = kFp8 ? kDim : kKeys;
  static constexpr int kValueRowBytes = kFp8 ? kKeys : kRowBytes;

  // Queries of width 256 stay in registers, for lack of shared memory; they arrive in the memory of the first tiles.
  static constexpr bool kHoldQueries = kDim == 256;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + (kHoldQueries ? 0 : kQueryBytes);

  static_assert(!kHoldQueries || kQueryBytes <= kStages * kStageBytes, "queries arrive in the memory of the tiles");
  static_assert(kValueBlockKeys % kKeys == 0, "a tile of fp8 values lies within a value block");
  static_assert(kBlockRows % kWarpRows == 0, "a warp's rows are of one block");
};

}  // namespace hstu_trt::smxx
