// SPDX-License-Identifier: Apache-2.0
// The tile list: which query rows meet which keys, built on the device once per forward and shared by its layers.
//
// Query rows are cut into blocks of 64 rows of one kind (prefix or candidate) of one user. A work item joins up to
// kMaxSlots blocks of one user; the slot of a block is the warpgroup that computes it. Keys are visited in tiles of
// `tile_keys`: first the cached tokens, then the prefix rows of this call, then (for candidates) the candidates' own
// rows. Items stand longest first, grouped by user within a class of length, so that CTAs that run together share keys
// in L2 and the last to finish are short.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace hstu_trt {

constexpr int kBlockRows = 64;
constexpr int kMaxSlots = 3;
constexpr int kNoBlock = -1;
// Tiles: fetching the next item takes longer than computing one that is no longer than this.
constexpr int kShortItem = 8;

// One user's rows. A prefix position counts from the user's first token: cached tokens, then rows of this call.
struct UserShape {
  int cached;  // cached tokens
  int prefix;  // cached + rows of this call
  int candidates;
  int queries;              // prefix rows of q: the last ones of the prefix
  int query_row;            // first prefix row in q
  int query_candidate_row;  // first candidate row in q
  int key_row;              // first prefix row in k and v
  int key_candidate_row;    // first candidate row in k and v
  int cached_row;           // first cached row (contiguous cache)
};

struct WorkItem {
  int32_t user;
  int32_t blocks[kMaxSlots];  // 2 * index of the 64-row block + (1: candidates), or kNoBlock
  int32_t tile_begin;         // key tiles [tile_begin, tile_end) of this item, or of its part
  int32_t tile_end;
  int32_t part;    // low 16 bits: part, high 16 bits: parts; 1 part: the whole item
  int32_t group;   // index in the list of the item's first part
  UserShape rows;  // of the user
  int32_t reserved[3];
};
static_assert(sizeof(WorkItem) == 80, "items are copied in 16-byte vectors");

// Head of the plan in the workspace; `items` follow it.
struct PlanHeader {
  int32_t num_items;      // items in the list, parts counted singly
  int32_t next_item;      // dynamic scheduler: next (item, head) to hand out
  int32_t finished_ctas;  // the last CTA to finish resets the counters for the next launch
  int32_t claim_ahead;    // items that a CTA holds at a time, up to 4: more hide latency, fewer balance better
  int32_t reserved[60];
};
static_assert(sizeof(PlanHeader) == 256, "items are 256-byte aligned");

struct PlanShape {
  int slots;       // row blocks per item, 1..kMaxSlots
  int tile_keys;   // keys per tile
  int self_tiles;  // tiles that the candidates' own rows take, behind an item's prefix tiles
  bool split;      // cut items into parts when there are fewer than the GPU has multiprocessors
};

// Items are split while items * parts * heads stays within this: two rounds of the largest GPU at hand.
constexpr int kMaxSplitWork = 288;

// Most items that a call of these bounds can have, parts counted singly.
int plan_max_items(AttentionParams const& params, PlanShape shape) noexcept;

// Bytes of header and items.
size_t plan_size(AttentionParams const& params, PlanShape shape) noexcept;

// Builds the plan at params.workspace and clears `counters` (may be none). Enqueues one kernel, which lets a dependent
// launch begin at once: the kernel behind it must wait for it (griddepcontrol.wait) if it is launched so.
cudaError_t launch_plan(AttentionParams const& params, PlanShape shape, int multiprocessors, int32_t* counters,
                        int num_counters, cudaStream_t stream) noexcept;

}  // namespace hstu_trt
