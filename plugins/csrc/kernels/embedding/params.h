// SPDX-License-Identifier: Apache-2.0
// What the embedding lookup is called with: plain data, no torch, no TensorRT.
#pragma once

#include <cstdint>

#include "../../../../tables/csrc/ids.h"
#include "../common/data_type.h"

namespace hstu_trt {

// An entry of an overlay's open-addressing hash: the row of that number is row `place` of the overlay. The search for
// row r begins at slot splitmix64(r, 0) & overlay_mask and goes on with the next one, up to a slot that is empty.
struct OverlaySlot {
  int64_t row;  // -1: empty
  int64_t place;
};

// One version of a table. Nothing in it may change as long as a launch can read it. All addresses are the device's.
// Rows, rows of the overlay and scales are contiguous.
struct EmbeddingTable {
  void const* hot;      // [hot_rows, dim] device memory: rows 0 to hot_rows - 1
  float const* scales;  // [hot_rows + cold_rows] device memory; of int8 and e4m3 rows
  // Ids below this number are numbers of hot rows: nothing is hashed, and no overlay is asked. 0 is always right, and
  // slower.
  int64_t direct_rows;
  int64_t rows;  // that ids may name; those that are nowhere answer zeros
  int64_t hot_rows;
  int64_t cold_rows;
  void const* cold;           // [cold_rows, dim] pinned host memory: the rows behind the hot ones, read over the bus
  uint32_t const* row_of_id;  // [id_count]; of a permutation
  void const* overlay;        // [places, dim]: rows that stand in for those of the same number
  float const* overlay_scales;
  OverlaySlot const* overlay_slots;  // [overlay_mask + 1], not all of them full; nullptr: no overlay
  int64_t overlay_mask;              // a power of two less 1
  int64_t id_count;
  int64_t default_row;  // -1: a row of zeros
  uint64_t seed;        // of splitmix64
  uint64_t version;     // for whoever asks; the kernel does not
  IdHash hash;
  int32_t reserved;
};

// Columns of the output, and the table whose rows stand there.
struct EmbeddingColumns {
  void const* ids;     // [count] int32, or int64 with wide_ids
  int64_t id_stride;   // elements from one id to the next
  void* status;        // [count] RowStatus as uint8, or int32 with wide_status; or nullptr
  uint64_t* bad_ids;   // device memory, or nullptr: ids outside of the table are added to it
  int32_t live_table;  // place among the live tables
  int32_t dim;
  int32_t first;         // column of the output
  DataType type;         // of the table: any
  EmbeddingTable table;  // counts unless the call has live_tables
  int64_t status_stride;
};

constexpr int kMaxEmbeddingColumns = 8;

// out[i, first : first + dim] = row of ids[i], for each of the columns.
struct EmbeddingParams {
  void* out;               // [count, out_stride]
  int32_t const* lengths;  // [count / padded_length], or nullptr: ids behind a sequence's end count as padding
  // Device memory, or nullptr: a word with the address of an array of tables in device memory. The kernel reads them
  // instead of `table`, so that captured launches see versions that were exchanged. Widths and types stay, and the
  // addresses of rows are multiples of 16 bytes.
  EmbeddingTable const* const* live_tables;
  // Device memory of the caller's, or nullptr. With it, the word is read once per launch, by a small kernel before the
  // lookup: a launch sees one version whenever the word changes. Without, the word must not change during a launch.
  EmbeddingTable const** latch;
  int64_t count;
  int64_t out_stride;     // elements
  int64_t padded_length;  // ids per sequence, with lengths
  int64_t padding_id;     // counts if has_padding: a row of zeros
  IdPolicy policy;        // kReject: a row of zeros and the status say so
  int32_t has_padding;
  DataType output_type;  // kFloat32, kFloat16 or kBFloat16
  int32_t wide_ids;
  int32_t wide_status;
  int32_t column_count;
  EmbeddingColumns columns[kMaxEmbeddingColumns];
};

}  // namespace hstu_trt
