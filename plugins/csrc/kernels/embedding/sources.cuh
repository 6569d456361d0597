// SPDX-License-Identifier: Apache-2.0
// From ids to where their rows lie: one lane per id, whatever the width of a row.
#pragma once

#include "params.h"

namespace hstu_trt {

// A row of the output to be written.
struct RowSource {
  void const* row;     // nullptr: zeros
  float const* scale;  // of quantised rows
  int32_t place;       // row of the output; -1: none
};

struct FoundRow {
  void const* row;
  float const* scale;
  RowStatus status;
  bool is_cold;
};

inline __device__ int64_t find_in_overlay(EmbeddingTable const& table, int64_t row) {
  int64_t const mask = table.overlay_mask;
  int64_t at = static_cast<int64_t>(splitmix64(row, 0)) & mask;
  for (int64_t tried = 0; tried <= mask; ++tried, at = (at + 1) & mask) {
    OverlaySlot const slot = table.overlay_slots[at];
    if (slot.row == row) return slot.place;
    if (slot.row < 0) break;
  }
  return -1;
}

// Where row `row` of the table lies. No number leads outside of what the table has.
inline __device__ FoundRow find_row(EmbeddingTable const& table, int64_t row, int64_t row_bytes) {
  if (table.overlay_slots) {
    int64_t const place = find_in_overlay(table, row);
    if (place >= 0) {
      float const* const scale = table.overlay_scales ? table.overlay_scales + place : nullptr;
      return {static_cast<char const*>(table.overlay) + place * row_bytes, scale, RowStatus::kGpu, false};
    }
  }
  float const* const scale = table.scales ? table.scales + row : nullptr;
  if (row < table.hot_rows) {
    return {static_cast<char const*>(table.hot) + row * row_bytes, scale, RowStatus::kGpu, false};
  }
  int64_t const behind = row - table.hot_rows;
  if (behind < table.cold_rows) {
    return {static_cast<char const*>(table.cold) + behind * row_bytes, scale, RowStatus::kHost, true};
  }
  return {nullptr, nullptr, RowStatus::kMissing, false};
}

inline __device__ IdRule rule_of(EmbeddingParams const& p, EmbeddingTable const& table) {
  return {table.rows,   table.seed, table.row_of_id, table.id_count, table.default_row,
          p.padding_id, table.hash, p.policy,        p.has_padding,  0};
}

inline __device__ bool is_behind_end(EmbeddingParams const& p, int64_t place) {
  if (!p.lengths) return false;
  int64_t const sequence = place / p.padded_length;
  return place - sequence * p.padded_length >= p.lengths[sequence];
}

__device__ __forceinline__ int64_t load_id(EmbeddingParams const& p, EmbeddingColumns const& columns, int64_t place) {
  int64_t const at = place * columns.id_stride;
  return p.wide_ids ? static_cast<int64_t const*>(columns.ids)[at] : static_cast<int32_t const*>(columns.ids)[at];
}

// The row of output row `place`, whatever its id is. A function of its own: instructions come from memory anew in each
// launch, and those of most calls are few without this.
inline __device__ __noinline__ FoundRow find_any_row(EmbeddingParams const& p, EmbeddingColumns const& columns,
                                                     EmbeddingTable const& table, int64_t place, int64_t row_bytes) {
  if (is_behind_end(p, place)) return {nullptr, nullptr, RowStatus::kPadding, false};
  int64_t const id = load_id(p, columns, place);
  ResolvedId const resolved = resolve_id(rule_of(p, table), id, RowStatus::kGpu);
  if (resolved.row < 0) return {nullptr, nullptr, resolved.status, false};
  FoundRow found = find_row(table, resolved.row, row_bytes);
  // A bad id's row may come from anywhere: that the id is bad is what counts.
  if (resolved.status == RowStatus::kBadId) found.status = RowStatus::kBadId;
  return found;
}

inline __device__ void write_status(EmbeddingParams const& p, EmbeddingColumns const& columns, int64_t place,
                                    RowStatus status) {
  int64_t const at = place * columns.status_stride;
  if (p.wide_status) {
    static_cast<int32_t*>(columns.status)[at] = static_cast<int32_t>(status);
  } else {
    static_cast<uint8_t*>(columns.status)[at] = static_cast<uint8_t>(status);
  }
}

// The row of this lane's id among [first, first + count), count <= 32; what is left of its status is written and
// counted. To be called by whole warps; lanes from `count` on get zeros.
inline __device__ FoundRow find_own_row(EmbeddingParams const& p, EmbeddingColumns const& columns,
                                        EmbeddingTable const& table, int64_t row_bytes, int64_t first, int count) {
  int const lane = static_cast<int>(threadIdx.x % 32);
  FoundRow found{nullptr, nullptr, RowStatus::kGpu, false};
  if (lane < count) {
    int64_t const id = load_id(p, columns, first + lane);
    bool const is_special = p.lengths || p.has_padding;
    if (!is_special && static_cast<uint64_t>(id) < static_cast<uint64_t>(table.direct_rows)) {
      found.row = static_cast<char const*>(table.hot) + id * row_bytes;
      found.scale = table.scales + id;
    } else {
      found = find_any_row(p, columns, table, first + lane, row_bytes);
    }
    if (columns.status) write_status(p, columns, first + lane, found.status);
  }
  if (columns.bad_ids) {
    uint32_t const bad = __ballot_sync(0xFFFFFFFFu, lane < count && found.status == RowStatus::kBadId);
    if (bad != 0 && lane == 0) atomicAdd(reinterpret_cast<unsigned long long*>(columns.bad_ids), __popc(bad));
  }
  return found;
}

}  // namespace hstu_trt
