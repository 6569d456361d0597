// SPDX-License-Identifier: Apache-2.0
// Which key tiles a consumer's block of 64 rows needs, and which keys of them its rows see.
#pragma once

#include "sm90_consumer.cuh"

namespace hstu_trt::sm90 {

// Prefix keys that a row of this block sees.
template <class T>
__device__ KeyRange Consumer<T>::keys_of_row(int row) const {
  MaskRules const rules(params_);
  int const prefix = slot_->item.rows.prefix;
  return is_candidate_ ? rules.candidate(prefix)
                       : rules.prefix_query(prefix - slot_->item.rows.queries + first_row_ + row, prefix);
}

// The tiles that this block needs, [needed_begin_, needed_end_), and those whose keys all its rows see:
// [plain_begin_, plain_end_) but for the last tile of the cached tokens, if it is not full.
template <class T>
__device__ void Consumer<T>::find_tiles() {
  int const prefix = uniform(slot_->item.rows.prefix), cached = uniform(slot_->item.rows.cached);
  int const cached_tiles = ceil_tiles(cached);
  prefix_tiles_ = cached_tiles + ceil_tiles(prefix - cached);
  KeyRange const first = keys_of_row(0), last = keys_of_row(rows_ - 1);
  KeyRange const any{min(first.first, last.first), max(first.last, last.last)};
  // Where the end that all rows see is known from the first and the last: others may see less in a window.
  bool const monotone = is_candidate_ || (params_.max_attn_len == 0 && params_.contextual_seq_len == 0);
  int const common_end = monotone ? min(first.last, last.last) + 1 : 0;
  auto tile_of = [&](int position) {
    return position < cached ? position / T::kTileKeys : cached_tiles + (position - cached) / T::kTileKeys;
  };
  bool const empty = rows_ == 0 || any.first > any.last;
  needed_begin_ = empty ? tile_end_ : max(tile_begin_, tile_of(any.first));
  needed_end_ = empty ? tile_begin_ : min(min(tile_end_, prefix_tiles_), tile_of(any.last) + 1);
  plain_begin_ = tile_of(max(first.first, last.first) + T::kTileKeys - 1);
  plain_end_ = common_end >= cached ? cached_tiles + (common_end - cached) / T::kTileKeys : common_end / T::kTileKeys;
  int const self_tile = prefix_tiles_ + warpgroup_ / T::kSelfBlocks;
  self_tile_ = is_candidate_ && self_tile < tile_end_ ? self_tile : -1;
  ragged_tile_ = cached % T::kTileKeys == 0 ? -1 : cached_tiles - 1;
  needed_begin_ = uniform(needed_begin_), needed_end_ = uniform(needed_end_);
  plain_begin_ = uniform(plain_begin_), plain_end_ = uniform(plain_end_);
}

template <class T>
__device__ int Consumer<T>::ceil_tiles(int keys) {
  return (keys + T::kTileKeys - 1) / T::kTileKeys;
}

template <class T>
__device__ bool Consumer<T>::is_edge(int tile) const {
  return tile < plain_begin_ || tile >= plain_end_ || tile == ragged_tile_;
}

// Prefix positions of a tile's keys that exist.
template <class T>
__device__ KeyRange Consumer<T>::keys_of_tile(int tile) const {
  int const cached = slot_->item.rows.cached, cached_tiles = ceil_tiles(cached);
  int const first = tile < cached_tiles ? tile * T::kTileKeys : cached + (tile - cached_tiles) * T::kTileKeys;
  return {first, min(first + T::kTileKeys, tile < cached_tiles ? cached : slot_->item.rows.prefix) - 1};
}

// Keys of a tile that this thread's two rows see.
template <class T>
__device__ typename Consumer<T>::RowKeys Consumer<T>::keys_of_rows(int tile) const {
  int const last = keys_of_tile(tile).last;
  RowKeys keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keys.row[half] = keys_of_row(fragment_row(thread_) + 8 * half);
    keys.row[half].last = min(keys.row[half].last, last);
  }
  return keys;
}

// Own keys of the block, of which this thread's two rows see those of their candidate groups, up to themselves.
template <class T>
__device__ typename Consumer<T>::RowKeys Consumer<T>::own_keys_of_rows() const {
  int const group = params_.candidate_group_size;
  RowKeys keys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = fragment_row(thread_) + 8 * half;
    keys.row[half] = {row - row % group, row};
  }
  return keys;
}

}  // namespace hstu_trt::sm90
