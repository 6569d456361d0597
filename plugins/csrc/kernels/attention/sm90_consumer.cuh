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

  // Prefix keys that a row of this block sees.
  __device__ KeyRange keys_of_row(int row) const {
    MaskRules const rules(params_);
    int const prefix = slot_->item.rows.prefix;
    return is_candidate_ ? rules.candidate(prefix)
                         : rules.prefix_query(prefix - slot_->item.rows.queries + first_row_ + row, prefix);
  }

  // The tiles that this block needs, [needed_begin_, needed_end_), and those whose keys all its rows see:
  // [plain_begin_, plain_end_) but for the last tile of the cached tokens, if it is not full.
  __device__ void find_tiles() {
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

  static __device__ int ceil_tiles(int keys) { return (keys + T::kTileKeys - 1) / T::kTileKeys; }

  __device__ bool is_edge(int tile) const { return tile < plain_begin_ || tile >= plain_end_ || tile == ragged_tile_; }

  // Prefix positions of a tile's keys that exist.
  __device__ KeyRange keys_of_tile(int tile) const {
    int const cached = slot_->item.rows.cached, cached_tiles = ceil_tiles(cached);
    int const first = tile < cached_tiles ? tile * T::kTileKeys : cached + (tile - cached_tiles) * T::kTileKeys;
    return {first, min(first + T::kTileKeys, tile < cached_tiles ? cached : slot_->item.rows.prefix) - 1};
  }

  // ---- products ----

  __device__ void multiply_tiles() {
    int tile = tile_begin_;
    for (; tile < min(needed_begin_, min(tile_end_, prefix_tiles_)); ++tile) skip_tile(tile);
    if (tile < needed_end_) {
      if constexpr (T::kOperands == 1) {
        first_tile(tile);
        for (++tile; tile < needed_end_; ++tile) next_tile(tile);
        finish_tile(tile - 1, operands_[0]);
      } else {
        tile = multiply_by_turns(tile);
      }
    }
    for (; tile < tile_end_; ++tile) {
      if (tile == self_tile_) {
        multiply_self(tile);
      } else {
        skip_tile(tile);
      }
    }
    keys_.count += tile_end_ - tile_begin_;
    values_.count += tile_end_ - tile_begin_;
  }

  __device__ void skip_tile(int tile) {
    begin_turn();
    end_turn();
    wait_key(tile);
    release_key(tile);
    wait_value(tile);
    release_value(tile);
  }

  // One operand: SiLU of a tile waits in the scores' registers until the products that read the operand have ended.
  __device__ void next_tile(int tile) {
    start_tile(tile, operands_[0]);
    apply_silu(tile);
    products_wait<0>();
    pin(out_);
    release_value(tile - 1);
    pack_fragments<Element>(scores_, operands_[0]);
  }

  // Two operands: tiles fill them by turns, and products never wait for SiLU. Returns the tile behind the last.
  __device__ int multiply_by_turns(int tile) {
    auto& even = operands_[0];
    auto& odd = operands_[T::kOperands - 1];
    int const first = tile;
    auto next = [&](int tile, Operand& before, Operand& scores) {
      start_tile(tile, before);
      pin(scores);
      if (tile - 2 >= first) release_value(tile - 2);
      apply_silu(tile);
      pack_fragments<Element>(scores_, scores);
    };
    first_tile(tile++);
    while (tile + 1 < needed_end_) {
      next(tile++, even, odd);
      next(tile++, odd, even);
    }
    if (tile < needed_end_) {
      next(tile++, even, odd);
      finish_tile(tile - 1, odd);
    } else {
      finish_tile(tile - 1, even);
    }
    if (tile - 2 >= first) release_value(tile - 2);
    return tile;
  }

  __device__ void first_tile(int tile) {
    wait_key(tile);
    begin_turn();
    multiply_keys(tile);
    products_wait<0>();
    pin(scores_);
    end_turn();
    release_key(tile);
    apply_silu(tile);
    pack_fragments<Element>(scores_, operands_[0]);
  }

  // Starts the products of a tile with its keys and of the tile before with its values, and waits for the former and
  // for all older ones.
  __device__ void start_tile(int tile, Operand& before) {
    wait_key(tile);
    begin_turn();
    multiply_keys(tile);
    prepare_values(tile - 1);
    multiply_values(tile - 1, before);
    products_wait<1>();
    pin(scores_);
    end_turn();
    release_key(tile);
  }

  __device__ void finish_tile(int tile, Operand& scores) {
    prepare_values(tile);
    multiply_values(tile, scores);
    products_wait<0>();
    pin(out_);
    release_value(tile);
  }

  // S = Q K^T, in flight when this returns.
  __device__ void multiply_keys(int tile) {
    SharedOperand const keys = key_operand(tile);
    if constexpr (T::kQueriesInRegisters) pin(queries_in_registers_);
    products_begin();
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      if constexpr (T::kQueriesInRegisters) {
        Wgmma<Element, T::kTileKeys>::left(scores_, queries_in_registers_[step], key_at(keys, step), step > 0);
      } else {
        Wgmma<Element, T::kTileKeys>::both(scores_, query_at(step), key_at(keys, step), step > 0);
      }
    }
    products_commit();
  }

  // O += P V, in flight when this returns.
  __device__ void multiply_values(int tile, Operand& scores) {
    SharedOperand const values = value_operand(tile);
    pin(scores);
    products_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_left(out_, scores[step], value_at(values, step));
    }
    products_commit();
  }

  __device__ void multiply_left(float (&out)[T::kDim / 2], uint32_t const (&scores)[4], SharedOperand values) {
    if constexpr (T::kFp8) {
      Wgmma<Element, T::kDim>::left(out, scores, values);
    } else {
      Wgmma<Element, T::kDim>::left_rows(out, scores, values);
    }
  }

  // Queries are read once instead of once per tile: the tensor cores then leave shared memory to the copy engine.
  __device__ void load_queries(int query_slot) {
    int const lane = thread_ % 32, row = thread_ / 32 * 16 + lane % 16;
    uint32_t const block = shared_address(query_block(query_slot));
    constexpr int kStepsPerPanel = T::kRowBytes / 32;
    int const swizzle = T::kRowBytes == 128 ? row % 8 : row / 2 % 4;
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      int const chunk = step % kStepsPerPanel * 2 + lane / 16;
      uint32_t const panel = block + step / kStepsPerPanel * kBlockRows * T::kRowBytes;
      load_matrices(queries_in_registers_[step], panel + row * T::kRowBytes + (chunk ^ swizzle) * 16);
    }
  }

  // The candidates' own keys: the 64 x 64 square on the diagonal of this block.
  __device__ void multiply_self(int tile) {
    wait_key(tile);
    begin_turn();
    float scores[kBlockRows / 2];
    SharedOperand const keys = operand_at(key_operand(tile), self_row() * T::kRowBytes);
    products_begin();
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      Wgmma<Element, kBlockRows>::both(scores, query_at(step), key_at(keys, step), step > 0);
    }
    products_commit();
    products_wait<0>();
    pin(scores);
    end_turn();
    release_key(tile);
    int const group = params_.candidate_group_size;
    KeyRange range[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = fragment_row(thread_) + 8 * half;
      range[half] = {row - row % group, row};
    }
    mask_scores(scores, range, 0, thread_);
    silu(scores, half_alpha_);
    uint32_t operand[kSelfSteps][4];
    pack_fragments<Element>(scores, operand);
    wait_value(tile);
    if constexpr (!T::kFp8) clear_values(tile, self_row() + rows_, self_row() + kBlockRows);
    uint32_t const value_offset = T::kFp8 ? self_row() : self_row() * kPanelBytes;
    SharedOperand const values = operand_at(value_operand(tile), value_offset);
    pin(operand);
    products_begin();
#pragma unroll
    for (int step = 0; step < kSelfSteps; ++step) multiply_left(out_, operand[step], value_at(values, step));
    products_commit();
    products_wait<0>();
    pin(out_);
    release_value(tile);
  }

  // This block's first row in the tile of own keys.
  __device__ uint32_t self_row() const { return warpgroup_ % T::kSelfBlocks * kBlockRows; }

  // ---- scores ----

  // SiLU of a tile's scores; 0 where a row does not see a key. With one operand, SiLU stands in both branches: behind
  // them, the compiler would move it past the next wait for products.
  __device__ void apply_silu(int tile) {
    bool const edge = is_edge(tile);
    if (edge) {
      mask_scores(scores_, keys_of_rows(tile).row, keys_of_tile(tile).first, thread_);
      if constexpr (T::kOperands == 1) silu(scores_, half_alpha_);
    }
    if (T::kOperands == 2 || !edge) silu(scores_, half_alpha_);
  }

  // Keys of a tile that this thread's two rows see.
  struct RowKeys {
    KeyRange row[2];
  };
  __device__ RowKeys keys_of_rows(int tile) const {
    int const last = keys_of_tile(tile).last;
    RowKeys keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      keys.row[half] = keys_of_row(fragment_row(thread_) + 8 * half);
      keys.row[half].last = min(keys.row[half].last, last);
    }
    return keys;
  }

  // ---- operands in shared memory ----

  __device__ SharedOperand query_at(int step) const { return panel_step(query_operand_, step, kBlockRows); }
  static __device__ SharedOperand key_at(SharedOperand keys, int step) { return panel_step(keys, step, T::kTileKeys); }

  static __device__ SharedOperand panel_step(SharedOperand operand, int step, int panel_rows) {
    constexpr int kStepsPerPanel = T::kRowBytes / 32;
    return operand_at(operand, step / kStepsPerPanel * panel_rows * T::kRowBytes + step % kStepsPerPanel * 32);
  }

  // Halves: 16 rows of keys are a step, panels of 64 dims lie side by side. fp8: rows are dims, 32 keys a step.
  static __device__ SharedOperand value_at(SharedOperand values, int step) {
    return operand_at(values, T::kFp8 ? 32 * step : 16 * kPanelBytes * step);
  }

  __device__ SharedOperand key_operand(int tile) const {
    return shared_operand(shared_address(memory_.keys[keys_.stage(tile - tile_begin_)]), T::kRowSwizzle,
                          8 * T::kRowBytes);
  }

  __device__ SharedOperand value_operand(int tile) const {
    return shared_operand(shared_address(memory_.values[values_.stage(tile - tile_begin_)]), T::kValueSwizzle,
                          8 * T::kValueRowBytes, T::kTileKeys * kPanelBytes);
  }

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

  __device__ void release_key(int tile) { release(&memory_.key_empty[keys_.stage(tile - tile_begin_)]); }
  __device__ void release_value(int tile) { release(&memory_.value_empty[values_.stage(tile - tile_begin_)]); }

  // ---- parts of items and output: sm90_output.cuh, sm90_cluster.cuh ----

  // Chunks: 8 columns of the output. Which ones a CTA stores.
  struct AllChunks {
    __device__ constexpr bool holds(int) const { return true; }
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
