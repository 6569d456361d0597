// SPDX-License-Identifier: Apache-2.0
// From a work item to rows in shared memory: which rows the mma.sync kernel reads, and their asynchronous copies.
#pragma once

#include "../common/mma.cuh"
#include "../common/ptx.cuh"
#include "mask.cuh"
#include "plan.h"
#include "smxx_traits.cuh"

namespace hstu_trt::smxx {

enum class Section { kCached, kPrefix, kCandidates };

// Keys [first, end) of a section, of which the tile holds as many as it has rows. Cached tokens and prefix rows count
// from the user's first token, candidates from the user's first candidate.
struct KeyTile {
  Section section;
  int first;
  int end;
};

// Rows of one slot of an item: prefix rows of q, or candidates, of one user.
struct BlockRows {
  bool candidates;
  int first;
  int count;
};

// A work item as the whole CTA needs it, in shared memory.
struct ItemState {
  UserShape user;
  int user_index;
  int head;
  int blocks[kSlots];
  int cached_tiles;  // tiles of cached tokens
  int tile_begin;    // first tile of the prefix, cached or not
  int prefix_end;    // end of these tiles
  int self_begin;    // first tile of the candidates' own keys
  int tiles;         // tiles in all

  __device__ BlockRows block_rows(int slot) const {
    int const block = blocks[slot];
    if (block == kNoBlock) return {false, 0, 0};
    bool const candidates = block % 2 != 0;
    int const first = block / 2 * kBlockRows;
    return {candidates, first, min(kBlockRows, (candidates ? user.candidates : user.queries) - first)};
  }

  __device__ int query_row(bool candidates, int index) const {
    return (candidates ? user.query_candidate_row : user.query_row) + index;
  }

  // Row in k and v of a key that is not cached.
  __device__ int key_row(Section section, int key) const {
    return section == Section::kCandidates ? user.key_candidate_row + key : user.key_row + key - user.cached;
  }

  template <int kKeys>
  __device__ KeyTile tile(int step) const {
    int const index = tile_begin + step;
    if (index >= prefix_end) return {Section::kCandidates, (self_begin + index - prefix_end) * kKeys, user.candidates};
    if (index < cached_tiles) return {Section::kCached, index * kKeys, user.cached};
    return {Section::kPrefix, user.cached + (index - cached_tiles) * kKeys, user.prefix};
  }
};

// The plan's tiles end at the prefix, or behind it for candidates: those then see the tiles from the first of their
// groups to their last row, however many these are.
template <int kKeys>
__device__ ItemState read_item(AttentionParams const& p, WorkItem const& work, int head) {
  ItemState item;
  item.user = user_shape(p, work.user);
  item.user_index = work.user;
  item.head = head;
  item.cached_tiles = (item.user.cached + kKeys - 1) / kKeys;
  int const prefix_tiles = item.cached_tiles + (item.user.prefix - item.user.cached + kKeys - 1) / kKeys;
  item.tile_begin = work.tile_begin;
  item.prefix_end = max(work.tile_begin, min(work.tile_end, prefix_tiles));
  int first = INT_MAX, end = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    item.blocks[slot] = work.blocks[slot];
    BlockRows const rows = item.block_rows(slot);
    if (!rows.candidates) continue;
    first = min(first, rows.first - rows.first % p.candidate_group_size);
    end = max(end, rows.first + rows.count);
  }
  item.self_begin = first / kKeys;
  int const self_tiles = end > 0 ? (end + kKeys - 1) / kKeys - item.self_begin : 0;
  item.tiles = item.prefix_end - item.tile_begin + self_tiles;
  return item;
}

// Rows of kPitch bytes in shared memory: their 16-byte chunks are permuted within 128 bytes, so that the eight rows of
// a matrix fall into different banks.
template <int kPitch>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  int const permutation = kPitch >= 128 ? row % 8 : row / (128 / kPitch) % (kPitch / 16);
  return row * kPitch + (chunk ^ permutation) * 16;
}

// Copies kRows rows of `row_bytes` to shared memory; rows from `rows` on and the rest of each row become zeros.
// `row_address(row)` is called for rows below `rows` only.
template <int kRows, int kPitch, int kThreads, class RowAddress>
__device__ __forceinline__ void copy_rows(uint32_t to, int rows, int row_bytes, RowAddress row_address) {
  constexpr int kChunks = kPitch / 16, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "a thread copies the same chunk of all its rows");
  static_assert(kRows % kRowsAtOnce == 0 || kRows < kRowsAtOnce, "all threads copy as many rows, or one at most");
  int const chunk = threadIdx.x % kChunks, first_row = threadIdx.x / kChunks;
#pragma unroll
  for (int i = 0; i < (kRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    int const row = first_row + i * kRowsAtOnce;
    if (kRows < kRowsAtOnce && row >= kRows) return;
    char const* const from = row_address(row < rows ? row : 0) + chunk * 16;
    copy_async(to + chunk_offset<kPitch>(row, chunk), from, row < rows && chunk * 16 < row_bytes);
  }
}

// First byte of one head of a tensor; rows are `stride` bytes apart.
template <class Element>
struct HeadRows {
  char const* first;
  int stride;

  __device__ HeadRows(TokenTensor const& tensor, int head)
      : first(static_cast<char const*>(tensor.data) + head * tensor.head_stride * sizeof(Element)),
        stride(static_cast<int>(tensor.row_stride * sizeof(Element))) {}

  __device__ __forceinline__ char const* operator[](int row) const { return first + static_cast<int64_t>(row) * stride; }
};

template <class T>
__device__ __forceinline__ void load_queries(AttentionParams const& p, ItemState const& item, uint32_t to) {
  HeadRows<typename T::Element> const queries(p.q, item.head);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    BlockRows const block = item.block_rows(slot);
    copy_rows<kBlockRows, T::kRowBytes, T::kThreads>(
        to + slot * kBlockRows * T::kRowBytes, block.count, p.qk_dim * sizeof(typename T::Element),
        [&](int row) { return queries[item.query_row(block.candidates, block.first + row)]; });
  }
}

// Row of a cached token in cached_k and cached_v.
__device__ __forceinline__ int cached_row(AttentionParams const& p, ItemState const& item, int position) {
  if (!p.page_table) return item.user.cached_row + position;
  int const shift = 31 - __clz(p.page_size);
  int const* const pages = p.page_table + static_cast<int64_t>(item.user_index) * p.pages_per_user;
  return (__ldg(pages + (position >> shift)) << shift) + (position & (p.page_size - 1));
}

// Values of a tile within their value block: [v_dim][128 keys], of which the tile takes kKeys.
template <class T>
__device__ __forceinline__ uint8_t const* tile_values(AttentionParams const& p, ItemState const& item, KeyTile tile) {
  int const first = tile.section == Section::kPrefix ? tile.first - item.user.cached : tile.first;
  int block = first / kValueBlockKeys;
  if (tile.section == Section::kCandidates) {
    int const row = item.user.key_candidate_row - p.prefix_offsets[p.users];
    block += value_blocks(p.key_rows, p.users) + first_value_block(row, item.user_index);
  } else if (tile.section == Section::kPrefix) {
    block += first_value_block(item.user.key_row, item.user_index);
  } else if (p.page_table) {
    block = __ldg(p.page_table + static_cast<int64_t>(item.user_index) * p.pages_per_user + block);
  } else {
    block += first_value_block(item.user.cached_row, item.user_index);
  }
  void const* const blocks = tile.section == Section::kCached ? p.cached_v.data : p.v.data;
  int64_t const head_block = static_cast<int64_t>(block) * p.heads + item.head;
  return static_cast<uint8_t const*>(blocks) + head_block * p.v_dim * kValueBlockKeys + first % kValueBlockKeys;
}

template <class T>
__device__ __forceinline__ void load_tile(AttentionParams const& p, ItemState const& item, KeyTile tile, uint32_t keys_to,
                                          uint32_t values_to) {
  using Element = typename T::Element;
  bool const cached = tile.section == Section::kCached;
  int const rows = tile.end - tile.first;
  int const first_row = cached ? 0 : item.key_row(tile.section, tile.first);
  auto const row_of = [&](int row) { return cached ? cached_row(p, item, tile.first + row) : first_row + row; };
  HeadRows<Element> const keys(cached ? p.cached_k : p.k, item.head);
  copy_rows<T::kKeys, T::kRowBytes, T::kThreads>(keys_to, rows, p.qk_dim * sizeof(Element),
                                                 [&](int row) { return keys[row_of(row)]; });
  if constexpr (T::kFp8) {
    auto const values = reinterpret_cast<char const*>(tile_values<T>(p, item, tile));
    copy_rows<T::kValueRows, T::kValueRowBytes, T::kThreads>(values_to, p.v_dim, T::kKeys,
                                                             [&](int row) { return values + row * kValueBlockKeys; });
  } else {
    HeadRows<Element> const values(cached ? p.cached_v : p.v, item.head);
    copy_rows<T::kKeys, T::kRowBytes, T::kThreads>(values_to, rows, p.v_dim * sizeof(Element),
                                                   [&](int row) { return values[row_of(row)]; });
  }
}

}  // namespace hstu_trt::smxx
