// SPDX-License-Identifier: Apache-2.0
// How one user's rows become items, and which key tiles an item visits.
#pragma once

#include "mask.cuh"
#include "plan.h"

namespace hstu_trt {

// Unsigned: divisors are constants, mostly powers of two.
constexpr __host__ __device__ int ceil_div(unsigned a, unsigned b) { return (a + b - 1) / b; }

// The row blocks of one user, and the items they make: groups of candidates, what is left over, groups of prefix rows
// from the last to the first. A user's items are so ordered from long to short.
template <class S>
struct UserItems {
  int candidate_groups, candidate_rest, prefix_groups, prefix_rest;

  __device__ explicit UserItems(UserShape const& user) {
    int const candidate_blocks = ceil_div(user.candidates, kBlockRows),
              prefix_blocks = ceil_div(user.queries, kBlockRows);
    candidate_groups = candidate_blocks / S::kSlots;
    candidate_rest = candidate_blocks % S::kSlots;
    prefix_groups = prefix_blocks / S::kSlots;
    prefix_rest = prefix_blocks % S::kSlots;
  }

  // Left-over blocks of both kinds share an item if there are slots for all.
  __device__ int rest_items() const {
    if (candidate_rest + prefix_rest == 0) return 0;
    return candidate_rest > 0 && prefix_rest > 0 && candidate_rest + prefix_rest > S::kSlots ? 2 : 1;
  }

  __device__ int count() const { return candidate_groups + rest_items() + prefix_groups; }
};

// Shapes that kernels ask for, as constants: the planner divides by them all the time.
template <int kSlots_, int kTileKeys_, int kSelfTiles_>
struct Shape {
  static constexpr int kSlots = kSlots_, kTileKeys = kTileKeys_, kSelfTiles = kSelfTiles_;
};

struct BlockRange {
  int begin, end;
  __device__ int size() const { return end - begin; }
};

struct ItemBlocks {
  BlockRange candidates, prefix;
};

template <class S>
__device__ ItemBlocks item_blocks(UserItems<S> const& user, int index) {
  constexpr int slots = S::kSlots;
  ItemBlocks blocks{{0, 0}, {0, 0}};
  if (index < user.candidate_groups) {
    blocks.candidates = {index * slots, (index + 1) * slots};
    return blocks;
  }
  index -= user.candidate_groups;
  int const rest_items = user.rest_items();
  if (index < rest_items) {
    bool const both = rest_items == 1;
    int const first_candidate = user.candidate_groups * slots, first_prefix = user.prefix_groups * slots;
    bool const candidates = both || index == 0, prefix = both || index == 1;
    if (candidates) blocks.candidates = {first_candidate, first_candidate + user.candidate_rest};
    if (prefix) blocks.prefix = {first_prefix, first_prefix + user.prefix_rest};
    return blocks;
  }
  int const group = user.prefix_groups - 1 - (index - rest_items);
  blocks.prefix = {group * slots, (group + 1) * slots};
  return blocks;
}

// What stands in a slot of an item, as WorkItem names it. Candidates come first: an fp8 value block of 128 candidates
// then starts at slot 0.
inline __device__ int slot_block(ItemBlocks const& blocks, int slot) {
  if (slot < blocks.candidates.size()) return 2 * (blocks.candidates.begin + slot) + 1;
  slot -= blocks.candidates.size();
  return slot < blocks.prefix.size() ? 2 * (blocks.prefix.begin + slot) : kNoBlock;
}

// Key tiles that an item visits. Ranges grow with the position but for contextual and exempt rows, which stand at the
// two ends: so the ends of a group bound it.
struct TileRange {
  int begin, end;
};

template <class S>
__device__ TileRange item_tiles(AttentionParams const& params, UserShape const& user, ItemBlocks const& blocks) {
  MaskRules const rules(params);
  int const cached_tiles = ceil_div(user.cached, S::kTileKeys);
  int const all_tiles = cached_tiles + ceil_div(user.prefix - user.cached, S::kTileKeys);
  auto tile_of = [&](int position) {
    constexpr unsigned kKeys = S::kTileKeys;
    return static_cast<int>(position < user.cached ? position / kKeys
                                                   : cached_tiles + (position - user.cached) / kKeys);
  };
  KeyRange keys{user.prefix, -1};
  auto extend = [&](KeyRange range) { keys = {min(keys.first, range.first), max(keys.last, range.last)}; };
  if (blocks.candidates.size() > 0) extend(rules.candidate(user.prefix));
  if (blocks.prefix.size() > 0) {
    int const first_query = user.prefix - user.queries;
    int const end = min(blocks.prefix.end * kBlockRows, user.queries);
    if (params.max_attn_len > 0 || params.contextual_seq_len > 0) {
      extend(rules.prefix_query(first_query + blocks.prefix.begin * kBlockRows, user.prefix));
      extend(rules.prefix_query(first_query + end - 1, user.prefix));
    } else {
      extend({0, first_query + end - 1});
    }
  }
  bool const sees_prefix = keys.first <= keys.last;
  TileRange tiles{sees_prefix ? tile_of(keys.first) : all_tiles, sees_prefix ? tile_of(keys.last) + 1 : all_tiles};
  if (blocks.candidates.size() > 0) tiles.end = all_tiles + S::kSelfTiles;
  return tiles;
}

// Into how many parts an item is cut: a part pays for reading its queries and for adding its sums.
inline __device__ int parts_of_item(int most, int tiles) {
  constexpr int kMinTilesPerPart = 4;
  return min(most, max(1, tiles / kMinTilesPerPart));
}

// Divisions by run-time numbers are long, and most items have `kUsual` parts.
template <int kUsual>
__device__ TileRange tiles_of_part(TileRange tiles, int part, int parts) {
  unsigned const length = tiles.end - tiles.begin;
  auto begin = [&](unsigned i) {
    return tiles.begin + static_cast<int>(parts == kUsual ? length * i / kUsual : length * i / parts);
  };
  return {begin(part), begin(part + 1)};
}

}  // namespace hstu_trt
