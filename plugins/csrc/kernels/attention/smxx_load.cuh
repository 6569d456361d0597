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

  // Row of a key in k and v, or in a contiguous cache.
  __device__ int key_row(Section section, int key) const {
    if (section == Section::kCached) return user.cached_row + key;
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

// How the threads of a CTA share kRows rows of kPitch bytes: a thread copies the same 16-byte chunk of all its rows.
template <int kRows, int kPitch, int kThreads>
struct CopyLane {
  static constexpr int kChunks = kPitch / 16;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kThreads % kChunks == 0 && kRowsAtOnce % 8 == 0, "all rows of a thread have the same permutation");
  static_assert(kRows % kRowsAtOnce == 0 || kCopies == 1, "all threads copy as many rows, or one at most");

  int row, chunk;
  int rows_left;  // rows that exist, from the thread's first

  __device__ __forceinline__ CopyLane(int rows, int row_bytes)
      : row(threadIdx.x / kChunks), chunk(threadIdx.x % kChunks), rows_left(chunk * 16 < row_bytes ? rows - row : 0) {}

  // Copies a piece of the thread's row number `i`, or zeros. `from` is not read if the row does not exist.
  __device__ __forceinline__ void copy(uint32_t to, int i, char const* from) const {
    if (kCopies == 1 && row >= kRows) return;
    copy_async(to + chunk_offset<kPitch>(row, chunk) + i * kRowsAtOnce * kPitch, from, i * kRowsAtOnce < rows_left);
  }
};

// Copies neighbouring rows, `stride` bytes apart; rows from `rows` on and the rest of each row become zeros.
template <int kRows, int kPitch, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t to, char const* from, int64_t stride, int rows, int row_bytes) {
  using Lane = CopyLane<kRows, kPitch, kThreads>;
  Lane const lane(rows, row_bytes);
  from += lane.row * stride + lane.chunk * 16;
#pragma unroll
  for (int i = 0; i < Lane::kCopies; ++i, from += Lane::kRowsAtOnce * stride) lane.copy(to, i, from);
}

// Likewise, for cached tokens at `position` and on, each in its page.
template <int kRows, int kPitch, int kThreads>
__device__ __forceinline__ void copy_paged_rows(uint32_t to, char const* from, int64_t stride, int rows, int row_bytes,
                                                int const* pages, int page_size, int position) {
  using Lane = CopyLane<kRows, kPitch, kThreads>;
  Lane const lane(rows, row_bytes);
  int const shift = 31 - __clz(page_size);
#pragma unroll
  for (int i = 0; i < Lane::kCopies; ++i) {
    int const offset = i * Lane::kRowsAtOnce;
    int const token = position + (offset < lane.rows_left ? lane.row + offset : 0);
    int const row = (__ldg(pages + (token >> shift)) << shift) + (token & (page_size - 1));
    lane.copy(to, i, from + row * stride + lane.chunk * 16);
  }
}

// First byte of a row and head.
template <class Element>
__device__ __forceinline__ char const* row_address(TokenTensor const& tensor, int row, int head) {
  return reinterpret_cast<char const*>(static_cast<Element const*>(tensor.data) + row * tensor.row_stride +
                                       head * tensor.head_stride);
}

template <class T>
__device__ __forceinline__ void load_queries(AttentionParams const& p, ItemState const& item, uint32_t to) {
  using Element = typename T::Element;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    BlockRows const block = item.block_rows(slot);
    copy_rows<kBlockRows, T::kRowBytes, T::kThreads>(
        to + slot * kBlockRows * T::kRowBytes,
        row_address<Element>(p.q, item.query_row(block.candidates, block.first), item.head),
        p.q.row_stride * sizeof(Element), block.count, p.qk_dim * sizeof(Element));
  }
}

// Page numbers of the item's user.
__device__ __forceinline__ int const* user_pages(AttentionParams const& p, ItemState const& item) {
  return p.page_table + static_cast<int64_t>(item.user_index) * p.pages_per_user;
}

// Keys, or values in the order of their tokens.
template <class T>
__device__ __forceinline__ void load_tokens(AttentionParams const& p, ItemState const& item, KeyTile tile, int dim,
                                            TokenTensor const& tensor, uint32_t to) {
  using Element = typename T::Element;
  int64_t const stride = tensor.row_stride * sizeof(Element);
  int const rows = tile.end - tile.first, row_bytes = dim * sizeof(Element);
  if (tile.section == Section::kCached && p.page_table) {
    copy_paged_rows<T::kKeys, T::kRowBytes, T::kThreads>(to, row_address<Element>(tensor, 0, item.head), stride, rows,
                                                         row_bytes, user_pages(p, item), p.page_size, tile.first);
  } else {
    char const* const from = row_address<Element>(tensor, item.key_row(tile.section, tile.first), item.head);
    copy_rows<T::kKeys, T::kRowBytes, T::kThreads>(to, from, stride, rows, row_bytes);
  }
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
    block = __ldg(user_pages(p, item) + block);
  } else {
    block += first_value_block(item.user.cached_row, item.user_index);
  }
  void const* const blocks = tile.section == Section::kCached ? p.cached_v.data : p.v.data;
  int64_t const head_block = static_cast<int64_t>(block) * p.heads + item.head;
  return static_cast<uint8_t const*>(blocks) + head_block * p.v_dim * kValueBlockKeys + first % kValueBlockKeys;
}

template <class T>
__device__ __forceinline__ void load_tile(AttentionParams const& p, ItemState const& item, KeyTile tile,
                                          uint32_t keys_to, uint32_t values_to) {
  bool const cached = tile.section == Section::kCached;
  load_tokens<T>(p, item, tile, p.qk_dim, cached ? p.cached_k : p.k, keys_to);
  if constexpr (T::kFp8) {
    auto const values = reinterpret_cast<char const*>(tile_values<T>(p, item, tile));
    copy_rows<T::kValueRows, T::kValueRowBytes, T::kThreads>(values_to, values, kValueBlockKeys, p.v_dim, T::kKeys);
  } else {
    load_tokens<T>(p, item, tile, p.v_dim, cached ? p.cached_v : p.v, values_to);
  }
}

}  // namespace hstu_trt::smxx
