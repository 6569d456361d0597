// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 query rows against all their key tiles.
//
// While the tensor cores multiply SiLU(S) of one tile with its values, the warpgroup computes SiLU of the next tile's
// scores. The warpgroups take turns: the next one starts its products when the scores of this one are there, so that
// SiLU of one and products of the other fall together.
#pragma once

#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "sm90_traits.cuh"

namespace hstu_trt::sm90 {

// Tells the compiler that all lanes hold the same value, which may then live in a uniform register.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;                              // + warpgroup: its turn to start products
constexpr int kWarpgroupBarrier = kTurnBarrier + kMaxSlots;  // + warpgroup: its own threads

template <class T>
class Consumer {
 public:
  using Element = typename T::Element;

  __device__ Consumer(AttentionParams const& params, SplitWorkspace const& split, SharedMemory<T>& memory,
                      int warpgroup)
      : params_(params), split_(split), memory_(memory), warpgroup_(warpgroup), thread_(threadIdx.x % 128) {}

  __device__ void run() {
    // The last warpgroup hands the first turn to the first.
    if (warpgroup_ == T::kConsumers - 1) end_turn();
    // A cluster has one head. What is read here does not stand in line behind the first tiles.
    if constexpr (T::kClusterParts > 1) {
      begin_head(blockIdx.y);
      scale_of_all_ = scale_of_all(params_);
    }
    for (;;) {
      int const slot = queries_.stage();
      barrier_wait(&memory_.query_full[slot], queries_.parity());
      slot_ = &memory_.items[items_.stage()];
      if (slot_->head < 0) return;
      begin_item(slot);
      multiply_tiles();
      if (rows_ > 0) end_item(slot);
      release(&memory_.query_empty[slot]);
      release(&memory_.item_empty[items_.stage()]);
      ++queries_.count, ++items_.count;
    }
  }

 private:
  static constexpr int kScores = T::kTileKeys / 2;                    // fp32 scores per thread and tile
  static constexpr int kSteps = T::kTileKeys * sizeof(Element) / 32;  // products along the keys of a tile
  using Operand = uint32_t[kSteps][4];
  static constexpr int kQuerySteps = T::kDim * sizeof(Element) / 32;
  static constexpr int kSelfSteps = kBlockRows * sizeof(Element) / 32;

  // ---- one item ----

  // What the loop over tiles needs stays in registers; the rest is read from the item's slot where an edge needs it.
  __device__ void begin_item(int query_slot) {
    tile_begin_ = uniform(slot_->item.tile_begin);
    tile_end_ = uniform(slot_->item.tile_end);
    query_operand_ = shared_operand(shared_address(query_block(query_slot)), T::kRowSwizzle, 8 * T::kRowBytes);
    if constexpr (T::kClusterParts == 1) begin_head(slot_->head);
    int const block = uniform(slot_->item.blocks[warpgroup_]);
    is_candidate_ = block != kNoBlock && (block & 1);
    first_row_ = block / 2 * kBlockRows;
    int const rows = uniform(is_candidate_ ? slot_->item.rows.candidates : slot_->item.rows.queries) - first_row_;
    rows_ = block == kNoBlock ? 0 : min(kBlockRows, rows);
    find_tiles();
    if constexpr (T::kQueriesInRegisters) load_queries(query_slot);
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) out_[i] = 0.f;
  }

  __device__ void begin_head(int head) {
    half_alpha_ = 0.5f * params_.alpha;
    if constexpr (T::kFp8) {
      int const i = scale_index(head);
      half_alpha_ *= params_.q_scale[i] * params_.k_scale[i];
      if constexpr (T::kClusterParts > 1) value_scale_ = params_.v_scale[i];
    }
  }

  __device__ float value_scale() const {
    if constexpr (!T::kFp8) return 1.f;
    return T::kClusterParts > 1 ? value_scale_ : params_.v_scale[scale_index(slot_->head)];
  }

  __device__ void end_item(int query_slot) {
    // Read before the parts are waited for.
    RowScales const scales = output_scales();
    if constexpr (T::kClusterParts == 1) {
      bool const whole = slot_->item.part >> 16 == 1;
      if (whole || add_parts()) store_output(query_slot, scales, AllChunks{});
    } else {
      ChunkRange const own = exchange_parts();
      if (own.begin < own.end) store_output(query_slot, scales, own);
    }
  }

  // ---- which tiles and keys: sm90_block_tiles.cuh ----

  __device__ KeyRange keys_of_row(int row) const;
  __device__ void find_tiles();
  static __device__ int ceil_tiles(int keys);
  __device__ bool is_edge(int tile) const;
  __device__ KeyRange keys_of_tile(int tile) const;
  // Of this thread's two rows.
  struct RowKeys {
    KeyRange row[2];
  };
  __device__ RowKeys keys_of_rows(int tile) const;
  __device__ RowKeys own_keys_of_rows() const;

  // ---- the tiles of an item: sm90_products.cuh ----

  __device__ void multiply_tiles();
  __device__ void skip_tile(int tile);
  __device__ void next_tile(int tile);
  __device__ int multiply_by_turns(int tile);
  __device__ void first_tile(int tile);
  __device__ void start_tile(int tile, Operand& before);
  __device__ void finish_tile(int tile, Operand& scores);
  __device__ void multiply_keys(int tile);
  __device__ void multiply_values(int tile, Operand& scores);
  __device__ void multiply_left(float (&out)[T::kDim / 2], uint32_t const (&scores)[4], SharedOperand values);
  __device__ void load_queries(int query_slot);
  __device__ void multiply_self(int tile);
  __device__ uint32_t self_row() const;
  __device__ void apply_silu(int tile);
  __device__ SharedOperand query_at(int step) const;
  static __device__ SharedOperand key_at(SharedOperand keys, int step);
  static __device__ SharedOperand panel_step(SharedOperand operand, int step, int panel_rows);
  static __device__ SharedOperand value_at(SharedOperand values, int step);
  __device__ SharedOperand key_operand(int tile) const;
  __device__ SharedOperand value_operand(int tile) const;

  // ---- tiles in shared memory ----

  __device__ void wait_key(int tile) {
    barrier_wait(&memory_.key_full[keys_.stage(tile - tile_begin_)], keys_.parity(tile - tile_begin_));
  }

  __device__ void wait_value(int tile) {
    barrier_wait(&memory_.value_full[values_.stage(tile - tile_begin_)], values_.parity(tile - tile_begin_));
  }

  // Waits for a tile's values. Rows past the end of the user's keys belong to others or to nobody: their scores are 0,
  // but 0 * NaN is NaN, so they become 0 as well. Value blocks come with zeros.
  __device__ void prepare_values(int tile) {
    wait_value(tile);
    if constexpr (!T::kFp8) {
      if (is_edge(tile)) {
        KeyRange const keys = keys_of_tile(tile);
        clear_values(tile, keys.last + 1 - keys.first, T::kTileKeys);
      }
    }
  }

  // Each warpgroup writes all the zeros that it will read; two may write the same ones.
  __device__ void clear_values(int tile, int begin, int end) {
    if (begin >= end) return;
    unsigned char* const values = memory_.values[values_.stage(tile - tile_begin_)];
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel) {
      uint4* const rows = reinterpret_cast<uint4*>(values + panel * T::kTileKeys * kPanelBytes);
      for (int i = begin * 8 + thread_; i < end * 8; i += 128) rows[i] = uint4{0, 0, 0, 0};
    }
    fence_shared_for_async();
    sync_warpgroup();
  }

  __device__ void release_key(int tile) { release(&memory_.key_empty[keys_.stage(tile - tile_begin_)]); }
  __device__ void release_value(int tile) { release(&memory_.value_empty[values_.stage(tile - tile_begin_)]); }

  // ---- barriers ----

  __device__ void begin_turn() {
    if constexpr (T::kTurns) named_barrier_sync(kTurnBarrier + warpgroup_, 256);
  }
  __device__ void end_turn() {
    if constexpr (T::kTurns) named_barrier_arrive(kTurnBarrier + (warpgroup_ + 1) % T::kConsumers, 256);
  }

  __device__ void sync_warpgroup() { named_barrier_sync(kWarpgroupBarrier + warpgroup_, 128); }

  // Every warp tells the producer that it is done with a stage.
  __device__ void release(uint64_t* empty) {
    __syncwarp();
    if (thread_ % 32 == 0) barrier_arrive(empty);
  }

  // ---- parts of items and output: sm90_output.cuh, sm90_cluster.cuh ----

  // Chunks: 8 columns of the output. Which ones a CTA stores.
  struct AllChunks {
    constexpr __device__ bool holds(int) const { return true; }
  };
  struct ChunkRange {
    int begin, end;
    __device__ bool holds(int chunk) const { return begin <= chunk && chunk < end; }
  };

  __device__ ChunkRange exchange_parts();
  __device__ void add_others(int rank, float* sums);
  __device__ void reopen_exchange(int rank);
  __device__ bool add_parts();
  __device__ float* split_sums(int part) const {
    int const entry = (slot_->item.group + part) * params_.heads + slot_->head;
    return split_.sums + static_cast<size_t>(entry * T::kConsumers + warpgroup_) * (kBlockRows * T::kDim);
  }

  struct RowScales {
    float row[2];
  };
  __device__ RowScales output_scales() const;
  template <class Chunks>
  __device__ void store_output(int query_slot, RowScales scales, Chunks chunks);
  template <class Output, class Chunks>
  __device__ void store_halves(Output* out, unsigned char* staging, Chunks chunks);
  template <class Chunks>
  __device__ void store_floats(float* out, Chunks chunks);

  __device__ unsigned char* query_block(int query_slot) const {
    return memory_.queries[query_slot] + warpgroup_ * T::kQueryBlockBytes;
  }
  __device__ int scale_index(int head) const { return params_.scale_count == 1 ? 0 : head; }

  AttentionParams const& params_;
  SplitWorkspace const& split_;
  SharedMemory<T>& memory_;
  int const warpgroup_, thread_;

  Pipeline<kItemSlots> items_;
  Pipeline<T::kQuerySlots> queries_;
  Pipeline<T::kStages> keys_;
  Pipeline<T::kValueStages> values_;

  uint32_t exchanges_ = 0;  // items whose parts this warpgroup has shared out in the cluster

  ItemSlot const* slot_;
  int tile_begin_, tile_end_, prefix_tiles_;
  bool is_candidate_;
  int first_row_, rows_;  // of the block: among the user's rows of its kind
  int needed_begin_, needed_end_, plain_begin_, plain_end_, ragged_tile_, self_tile_;
  SharedOperand query_operand_;
  float half_alpha_, value_scale_, scale_of_all_;

  uint32_t queries_in_registers_[T::kQueriesInRegisters ? kQuerySteps : 1][4];
  float scores_[kScores];
  Operand operands_[T::kOperands];  // SiLU of scores: the left operand of the products with values
  float out_[T::kDim / 2];
};

}  // namespace hstu_trt::sm90
