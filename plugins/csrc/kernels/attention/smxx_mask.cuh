// SPDX-License-Identifier: Apache-2.0
// Which keys of a tile the query rows of one warp see: all, none, or some by row.
#pragma once

#include <climits>

#include "mask.cuh"
#include "smxx_load.cuh"

namespace hstu_trt::smxx {

// The query rows of one warp: `first_row` and on among one user's prefix rows of q, or among its candidates.
struct WarpRows {
  bool candidates;
  int first_row;
  int count;       // rows that exist, at most a warp's
  int position;    // of the first row, from the user's first token
  int self_first;  // first candidate that any of the rows sees
  KeyRange seen;   // prefix keys that any of the rows sees lie within
  KeyRange dense;  // prefix keys that all of the rows see
};

// Prefix keys that row `row` of the warp sees.
__device__ __forceinline__ KeyRange prefix_keys(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                                int row) {
  MaskRules const rules(p);
  int const prefix = item.user.prefix;
  return rows.candidates ? rules.candidate(prefix) : rules.prefix_query(rows.position + row, prefix);
}

// Candidates that row `row` of the warp sees: those of its group, up to itself.
__device__ __forceinline__ KeyRange self_keys(AttentionParams const& p, WarpRows const& rows, int row) {
  int const candidate = rows.first_row + row;
  return {candidate - candidate % p.candidate_group_size, candidate};
}

// Called by whole warps; `found` is in shared memory.
template <class T>
__device__ __forceinline__ void find_warp_rows(AttentionParams const& p, ItemState const& item, WarpRows& found) {
  int const first = threadIdx.x / 32 * T::kWarpRows, lane = threadIdx.x % 32;
  BlockRows const block = item.block_rows(first / kBlockRows);
  WarpRows rows;
  rows.candidates = block.candidates;
  rows.first_row = block.first + first % kBlockRows;
  rows.count = max(0, min(T::kWarpRows, block.count - first % kBlockRows));
  rows.position = item.user.prefix - item.user.queries + rows.first_row;
  rows.self_first = self_keys(p, rows, 0).first;
  KeyRange seen{INT_MAX, -1}, dense{0, INT_MAX};
  if (lane < rows.count) seen = dense = prefix_keys(p, item, rows, lane);
  rows.seen = {__reduce_min_sync(~0u, seen.first), __reduce_max_sync(~0u, seen.last)};
  rows.dense = {__reduce_max_sync(~0u, dense.first), __reduce_min_sync(~0u, dense.last)};
  if (lane == 0) found = rows;
  __syncwarp();
}

// What a warp does with a tile: nothing, or products with or without a mask.
enum class TileUse { kSkip, kMask, kDense };

template <class T>
__device__ __forceinline__ TileUse tile_use(WarpRows const& rows, KeyTile tile) {
  int const end = min(tile.first + T::kKeys, tile.end);
  if (tile.section == Section::kCandidates) {
    bool const own = rows.candidates && tile.first < rows.first_row + rows.count && end > rows.self_first;
    return own ? TileUse::kMask : TileUse::kSkip;
  }
  if (tile.first > rows.seen.last || end <= rows.seen.first) return TileUse::kSkip;
  bool const dense = tile.first >= rows.dense.first && tile.first + T::kKeys <= tile.end &&
                     tile.first + T::kKeys - 1 <= rows.dense.last;
  return dense ? TileUse::kDense : TileUse::kMask;
}

// Sets scores of keys that their rows do not see to 0, whatever they hold: SiLU(0) is 0.
template <class T>
__device__ __forceinline__ void mask_scores(AttentionParams const& p, ItemState const& item, WarpRows const& rows,
                                            KeyTile tile, float (&scores)[T::kRowTiles][T::kKeys / 8][4]) {
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = 16 * i + 8 * half + lane / 4;
      KeyRange const keys =
          tile.section == Section::kCandidates ? self_keys(p, rows, row) : prefix_keys(p, item, rows, row);
      int const first = keys.first - tile.first - lane % 4 * 2;
      unsigned const count = max(0, min(keys.last + 1, tile.end) - keys.first);
#pragma unroll
      for (int j = 0; j < T::kKeys / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[i][j][2 * half + k];
          score = static_cast<unsigned>(8 * j + k - first) < count ? score : 0.f;
        }
      }
    }
  }
}

}  // namespace hstu_trt::smxx
