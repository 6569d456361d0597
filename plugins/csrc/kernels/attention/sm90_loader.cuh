// SPDX-License-Identifier: Apache-2.0
// The loader: one thread that keeps the copy engine ahead of the tensor cores.
#pragma once

#include "../common/ptx.cuh"
#include "sm90_traits.cuh"

namespace hstu_trt::sm90 {

template <class T>
class Loader {
 public:
  __device__ Loader(AttentionParams const& params, TensorMaps const& maps, SplitWorkspace const& split,
                    SharedMemory<T>& memory)
      : params_(params), maps_(maps), split_(split), memory_(memory) {}

  __device__ void run() {
    for (;; ++items_.count, ++queries_.count) {
      barrier_wait(&memory_.item_full[items_.stage()], items_.parity());
      item_ = &memory_.items[items_.stage()];
      int const slot = queries_.stage();
      barrier_wait(&memory_.query_empty[slot], queries_.parity() ^ 1);
      if (item_->head < 0) return barrier_arrive(&memory_.query_full[slot]);
      cached_tiles_ = (item_->item.rows.cached + T::kTileKeys - 1) / T::kTileKeys;
      prefix_tiles_ =
          cached_tiles_ + (item_->item.rows.prefix - item_->item.rows.cached + T::kTileKeys - 1) / T::kTileKeys;
      load_queries(slot);
      int const end = item_->item.tile_end;
      for (int tile = item_->item.tile_begin; tile < end; ++tile) {
        if constexpr (T::kClusterParts == 1) {
          if (tile == end - 1 && item_->item.part >> 16 > 1) announce_part();
        }
        load_keys(tile);
        load_values(tile);
      }
    }
  }

 private:
  __device__ void load_queries(int slot) {
    uint64_t* const full = &memory_.query_full[slot];
    int blocks = 0;
    for (int w = 0; w < T::kConsumers; ++w) blocks += block(w) != kNoBlock;
    barrier_arrive_expect(full, blocks * T::kQueryBlockBytes);
#pragma unroll 1
    for (int w = 0; w < T::kConsumers; ++w) {
      if (block(w) == kNoBlock) continue;
      int const first = block(w) & 1 ? item_->item.rows.query_candidate_row : item_->item.rows.query_row;
      load_rows(memory_.queries[slot] + w * T::kQueryBlockBytes, &maps_.query, full, first + block(w) / 2 * kBlockRows,
                kBlockRows);
    }
  }

  __device__ void load_keys(int tile) {
    int const stage = keys_.stage();
    barrier_wait(&memory_.key_empty[stage], keys_.parity() ^ 1);
    load_tile(tile, memory_.keys[stage], &memory_.key_full[stage], &maps_.key, &maps_.cached_key);
    ++keys_.count;
  }

  __device__ void load_values(int tile) {
    int const stage = values_.stage();
    barrier_wait(&memory_.value_empty[stage], values_.parity() ^ 1);
    if constexpr (T::kFp8) {
      load_value_block(tile, memory_.values[stage], &memory_.value_full[stage]);
    } else {
      load_tile(tile, memory_.values[stage], &memory_.value_full[stage], &maps_.value, &maps_.cached_value);
    }
    ++values_.count;
  }

  // Loads the rows of a tile that exist, box by box; the rest of the stage keeps what it held.
  __device__ void load_tile(int tile, unsigned char* to, uint64_t* full, CUtensorMap const* map,
                            CUtensorMap const* cached_map) {
    if (tile >= prefix_tiles_) return load_self_tile(tile - prefix_tiles_, to, full, map);
    bool const cached = tile < cached_tiles_;
    int const position = (cached ? tile : tile - cached_tiles_) * T::kTileKeys;
    int const rows =
        min(T::kTileKeys,
            (cached ? item_->item.rows.cached : item_->item.rows.prefix - item_->item.rows.cached) - position);
    bool const paged = cached && params_.page_table != nullptr;
    int const box_rows = paged ? T::kPagedBoxRows : T::kKeyBoxRows;
    int const boxes = (rows + box_rows - 1) / box_rows;
    barrier_arrive_expect(full, boxes * box_rows * T::kDim * sizeof(typename T::Element));
#pragma unroll 1
    for (int box = 0; box < boxes; ++box) {
      int const at = position + box * box_rows;
      int const row = paged ? paged_row(at) : (cached ? item_->item.rows.cached_row : item_->item.rows.key_row) + at;
      load_rows(to + box * box_rows * T::kRowBytes, cached ? cached_map : map, full, row, T::kTileKeys);
    }
  }

  __device__ void load_self_tile(int self_tile, unsigned char* to, uint64_t* full, CUtensorMap const* map) {
    int boxes = 0;
#pragma unroll
    for (int i = 0; i < T::kSelfBlocks; ++i) boxes += is_candidate_block(self_tile * T::kSelfBlocks + i);
    barrier_arrive_expect(full, boxes * T::kKeyBoxRows * T::kDim * sizeof(typename T::Element));
#pragma unroll 1
    for (int i = 0; i < T::kSelfBlocks; ++i) {
      int const w = self_tile * T::kSelfBlocks + i;
      if (!is_candidate_block(w)) continue;
      int const row = item_->item.rows.key_candidate_row + block(w) / 2 * kBlockRows;
      load_rows(to + i * kBlockRows * T::kRowBytes, map, full, row, T::kTileKeys);
    }
  }

  // fp8: the keys of the tile out of their value block.
  __device__ void load_value_block(int tile, unsigned char* to, uint64_t* full) {
    bool const cached = tile < cached_tiles_, own = tile >= prefix_tiles_;
    int const key = own ? first_candidate(tile - prefix_tiles_) : (cached ? tile : tile - cached_tiles_) * T::kTileKeys;
    int const block = key / kValueBlockKeys;
    int at;
    if (cached) {
      at = params_.page_table ? params_.page_table[item_->item.user * params_.pages_per_user + block]
                              : first_value_block(item_->item.rows.cached_row, item_->item.user) + block;
    } else if (own) {
      at = value_blocks(params_.key_rows, params_.users) +
           first_value_block(params_.candidate_offsets[item_->item.user], item_->item.user) + block;
    } else {
      at = first_value_block(item_->item.rows.key_row, item_->item.user) + block;
    }
    barrier_arrive_expect(full, T::kValueBytes);
    tma_load(to, cached ? &maps_.cached_value : &maps_.value, full, key % kValueBlockKeys, 0,
             at * params_.heads + item_->head);
  }

  // First candidate of a tile of the candidates' own keys; without candidates in it, any.
  __device__ int first_candidate(int self_tile) const {
    int const slot = self_tile * T::kSelfBlocks;
    return is_candidate_block(slot) ? block(slot) / 2 * kBlockRows : 0;
  }

  __device__ int paged_row(int position) const {
    int const page = params_.page_table[item_->item.user * params_.pages_per_user + position / params_.page_size];
    return page * params_.page_size + position % params_.page_size;
  }

  // Panels of a box stand `panel_rows` rows apart.
  __device__ void load_rows(unsigned char* to, CUtensorMap const* map, uint64_t* full, int row, int panel_rows) {
#pragma unroll 1
    for (int panel = 0; panel < T::kPanels; ++panel) {
      tma_load(to + panel * panel_rows * T::kRowBytes, map, full, panel * T::kPanelElements, row, item_->head);
    }
  }

  __device__ int block(int slot) const { return item_->item.blocks[slot]; }
  __device__ bool is_candidate_block(int slot) const {
    return slot < T::kConsumers && block(slot) != kNoBlock && (block(slot) & 1);
  }

  // The part that comes last adds up all of them. Asked here, a few tiles ahead of the consumers, who read the answer
  // behind the last tile's barrier.
  __device__ void announce_part() {
    int* const arrived = &split_.counters[item_->item.group * params_.heads + item_->head].arrived;
    bool const last = atomicAdd(arrived, 1) == (item_->item.part >> 16) - 1;
    if (last) *arrived = 0;
    item_->last_part = last;
  }

  AttentionParams const& params_;
  TensorMaps const& maps_;
  SplitWorkspace const& split_;
  SharedMemory<T>& memory_;
  Pipeline<kItemSlots> items_;
  Pipeline<T::kQuerySlots> queries_;
  Pipeline<T::kStages> keys_;
  Pipeline<T::kValueStages> values_;
  ItemSlot* item_;  // stays in shared memory: the loader has few registers
  int cached_tiles_, prefix_tiles_;
};

template <class T>
__device__ void load_items(AttentionParams const& params, TensorMaps const& maps, SplitWorkspace const& split,
                           SharedMemory<T>& memory) {
  Loader<T>(params, maps, split, memory).run();
}

inline __device__ void prefetch_tensor_maps(TensorMaps const& maps) {
  prefetch_tensor_map(&maps.query);
  prefetch_tensor_map(&maps.key);
  prefetch_tensor_map(&maps.value);
  prefetch_tensor_map(&maps.cached_key);
  prefetch_tensor_map(&maps.cached_value);
}

// While the plan is being made, memory is idle: the CTAs bring the first keys of every user into L2, a box of rows
// each. Values as well would hold up the plan, whose instructions come from memory, too. With many queries per user it
// is the tensor cores that are waited for.
template <class T>
__device__ void prefetch_first_keys(AttentionParams const& params, TensorMaps const& maps) {
  constexpr int kFewQueries = 256;
  if (params.query_rows > kFewQueries * params.users) return;
  bool const cached = params.cached_k.data != nullptr, paged = params.page_table != nullptr;
  int const user = blockIdx.x % params.users, position = blockIdx.x / params.users * T::kKeyBoxRows;
  int32_t const* const offsets = cached ? params.cached_offsets : params.prefix_offsets;
  int const first = offsets[user];
  if (paged || position >= offsets[user + 1] - first) return;
#pragma unroll 1
  for (int head = 0; head < params.heads; ++head) {
#pragma unroll 1
    for (int panel = 0; panel < T::kPanels; ++panel) {
      tma_prefetch(cached ? &maps.cached_key : &maps.key, panel * T::kPanelElements, first + position, head);
    }
  }
}

}  // namespace hstu_trt::sm90
