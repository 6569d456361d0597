// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup: 64 query rows against all their key tiles.
//
// While the tensor cores multiply SiLU(S) of one tile with its values, the warpgroup computes SiLU of the next tile's
// scores; the warpgroups take turns in issuing products, so that one fills the tensor cores while another computes.
#pragma once

#include "../common/ptx.cuh"
#include "fragments.cuh"
#include "sm90_traits.cuh"

namespace hstu_trt::sm90 {

// Tells the compiler that all lanes hold the same value, which may then live in a uniform register.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;                              // + warpgroup: its turn to issue products
constexpr int kWarpgroupBarrier = kTurnBarrier + kMaxSlots;  // + warpgroup: its own threads

template <class T>
class Consumer {
 public:
  using Element = typename T::Element;

  __device__ Consumer(AttentionParams const& params, SplitWorkspace const& split, SharedMemory<T>& memory, int warpgroup)
      : params_(params), split_(split), memory_(memory), warpgroup_(warpgroup), thread_(threadIdx.x % 128) {}

  __device__ void run() {
    // The last warpgroup hands the first turn to the first.
    if (warpgroup_ == T::kConsumers - 1) end_turn();
    for (;;) {
      int const slot = queries_.stage();
      barrier_wait(&memory_.query_full[slot], queries_.parity());
      ItemSlot const& item = memory_.items[slot];
      if (item.head < 0) return;
      begin_item(item, slot);
      multiply_tiles();
      bool const store = parts_ == 1 || add_parts(item);
      if (store) store_output(item, slot);
      release(&memory_.query_empty[slot]);
      ++queries_.count;
    }
  }

 private:
  static constexpr int kScores = T::kTileKeys / 2;  // fp32 scores per thread and tile
  static constexpr int kSteps = T::kTileKeys * sizeof(Element) / 32;  // products along the keys of a tile
  static constexpr int kSelfSteps = kBlockRows * sizeof(Element) / 32;

  // ---- one item ----

  __device__ void begin_item(ItemSlot const& slot, int query_slot) {
    UserShape const& user = slot.user;
    tile_begin_ = uniform(slot.item.tile_begin);
    tile_end_ = uniform(slot.item.tile_end);
    parts_ = uniform(slot.item.part >> 16);
    cached_ = uniform(user.cached);
    prefix_ = uniform(user.prefix);
    cached_tiles_ = (cached_ + T::kTileKeys - 1) / T::kTileKeys;
    prefix_tiles_ = cached_tiles_ + (prefix_ - cached_ + T::kTileKeys - 1) / T::kTileKeys;
    query_operand_ = shared_operand(shared_address(memory_.queries[query_slot] + warpgroup_ * T::kQueryBlockBytes),
                                    T::kRowSwizzle, 8 * T::kRowBytes);
    half_alpha_ = 0.5f * params_.alpha;
    if constexpr (T::kFp8) {
      half_alpha_ *= params_.q_scale[scale_index(slot.head)] * params_.k_scale[scale_index(slot.head)];
    }
    int const block = uniform(slot.item.blocks[warpgroup_]);
    is_candidate_ = block != kNoBlock && (block & 1);
    int const first_row = block / 2 * kBlockRows;
    rows_ = block == kNoBlock ? 0 : min(kBlockRows, uniform(is_candidate_ ? user.candidates : user.queries) - first_row);
    position_ = prefix_ - uniform(user.queries) + first_row;
    row_ = first_row + uniform(is_candidate_ ? user.query_candidate_row : user.query_row);
    find_tiles();
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) out_[i] = 0.f;
  }

  // Prefix keys that a row of this block sees.
  __device__ KeyRange keys_of_row(int row) const {
    MaskRules const rules(params_);
    return is_candidate_ ? rules.candidate(prefix_) : rules.prefix_query(position_ + row, prefix_);
  }

  // The tiles that this block needs, [needed_begin_, needed_end_); and the keys that all its rows see.
  __device__ void find_tiles() {
    KeyRange const first = keys_of_row(0), last = keys_of_row(rows_ - 1);
    KeyRange const any{min(first.first, last.first), max(first.last, last.last)};
    common_ = {max(first.first, last.first), min(first.last, last.last)};
    // In between may stand rows that see less than those at both ends.
    if (!is_candidate_ && (params_.max_attn_len > 0 || params_.contextual_seq_len > 0)) common_ = {prefix_, -1};
    bool const empty = rows_ == 0 || any.first > any.last;
    needed_begin_ = empty ? tile_end_ : max(tile_begin_, tile_of(any.first));
    needed_end_ = empty ? tile_end_ : min(tile_end_, tile_of(any.last) + 1);
  }

  __device__ int tile_of(int position) const {
    return position < cached_ ? position / T::kTileKeys : cached_tiles_ + (position - cached_) / T::kTileKeys;
  }

  // ---- products ----

  __device__ void multiply_tiles() {
    int const self_tile = is_candidate_ ? prefix_tiles_ + warpgroup_ / T::kSelfBlocks : -1;
    int const prefix_end = min(tile_end_, prefix_tiles_);
    int const needed_end = min(needed_end_, prefix_end);
    int tile = tile_begin_;
    for (; tile < min(needed_begin_, prefix_end); ++tile) skip_tile(tile);
    if (tile < needed_end) {
      first_tile(tile);
      for (++tile; tile < needed_end; ++tile) next_tile(tile);
      finish_tile(tile - 1);
    }
    for (; tile < tile_end_; ++tile) {
      if (tile == self_tile) {
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

  __device__ void first_tile(int tile) {
    wait_key(tile);
    begin_turn();
    multiply_keys(tile);
    end_turn();
    products_wait<0>();
    pin(scores_);
    release_key(tile);
    activate(tile);
    pack_fragments<Element>(scores_, probabilities_);
  }

  __device__ void next_tile(int tile) {
    wait_key(tile);
    begin_turn();
    multiply_keys(tile);
    prepare_values(tile - 1);
    multiply_values(tile - 1);
    end_turn();
    products_wait<1>();
    pin(scores_);
    release_key(tile);
    activate(tile);
    products_wait<0>();
    pin(out_);
    release_value(tile - 1);
    pack_fragments<Element>(scores_, probabilities_);
  }

  __device__ void finish_tile(int tile) {
    prepare_values(tile);
    multiply_values(tile);
    products_wait<0>();
    pin(out_);
    release_value(tile);
  }

  // S = Q K^T, in flight when this returns.
  __device__ void multiply_keys(int tile) {
    SharedOperand const keys = key_operand(tile);
    products_begin();
#pragma unroll
    for (int step = 0; step < T::kDim * static_cast<int>(sizeof(Element)) / 32; ++step) {
      Wgmma<Element, T::kTileKeys>::both(scores_, query_at(step), key_at(keys, step), step > 0);
    }
    products_commit();
  }

  // O += P V, in flight when this returns.
  __device__ void multiply_values(int tile) {
    SharedOperand const values = value_operand(tile);
    pin(probabilities_);
    products_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Wgmma<Element, T::kDim>::left(out_, probabilities_[step], value_at(values, step));
    }
    products_commit();
  }

  // The candidates' own keys: the 64 x 64 square on the diagonal of this block.
  __device__ void multiply_self(int tile) {
    wait_key(tile);
    begin_turn();
    float scores[kBlockRows / 2];
    uint32_t const row_offset = warpgroup_ % T::kSelfBlocks * kBlockRows;
    SharedOperand const keys = operand_at(key_operand(tile), row_offset * T::kRowBytes);
    products_begin();
#pragma unroll
    for (int step = 0; step < T::kDim * static_cast<int>(sizeof(Element)) / 32; ++step) {
      Wgmma<Element, kBlockRows>::both(scores, query_at(step), key_at(keys, step), step > 0);
    }
    products_commit();
    end_turn();
    products_wait<0>();
    pin(scores);
    release_key(tile);
    int const group = params_.candidate_group_size;
    KeyRange range[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = fragment_row(thread_) + 8 * half;
      range[half] = {row - row % group, row};
    }
    silu(scores, half_alpha_);
    mask_scores(scores, range, 0, thread_);
    uint32_t probabilities[kSelfSteps][4];
    pack_fragments<Element>(scores, probabilities);
    wait_value(tile);
    if constexpr (!T::kFp8) clear_values(tile, row_offset + rows_, row_offset + kBlockRows);
    uint32_t const value_offset = T::kFp8 ? row_offset : row_offset * kPanelBytes;
    SharedOperand const values = operand_at(value_operand(tile), value_offset);
    pin(probabilities);
    products_begin();
#pragma unroll
    for (int step = 0; step < kSelfSteps; ++step) {
      Wgmma<Element, T::kDim>::left(out_, probabilities[step], value_at(values, step));
    }
    products_commit();
    products_wait<0>();
    pin(out_);
    release_value(tile);
  }

  // ---- scores ----

  // SiLU of a tile's scores; 0 where a row does not see a key, on tiles at an edge. SiLU stands in both branches: in the
  // code behind them the compiler would move it past the wait for the products in flight.
  __device__ void activate(int tile) {
    bool const cached = tile < cached_tiles_;
    int const position = cached ? tile * T::kTileKeys : cached_ + (tile - cached_tiles_) * T::kTileKeys;
    int const end = min(position + T::kTileKeys, cached ? cached_ : prefix_);
    if (position < common_.first || position + T::kTileKeys > min(common_.last + 1, end)) {
      KeyRange range[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        KeyRange const keys = keys_of_row(fragment_row(thread_) + 8 * half);
        range[half] = {keys.first, min(keys.last, end - 1)};
      }
      silu(scores_, half_alpha_);
      mask_scores(scores_, range, position, thread_);
    } else {
      silu(scores_, half_alpha_);
    }
  }

  // ---- operands in shared memory ----

  __device__ SharedOperand query_at(int step) const { return panel_step(query_operand_, step, kBlockRows); }
  __device__ static SharedOperand key_at(SharedOperand keys, int step) { return panel_step(keys, step, T::kTileKeys); }

  __device__ static SharedOperand panel_step(SharedOperand operand, int step, int panel_rows) {
    constexpr int kStepsPerPanel = T::kRowBytes / 32;
    return operand_at(operand, step / kStepsPerPanel * panel_rows * T::kRowBytes + step % kStepsPerPanel * 32);
  }

  // Halves: 16 rows of keys are a step, panels of 64 dims lie side by side. fp8: rows are dims, 32 keys a step.
  __device__ static SharedOperand value_at(SharedOperand values, int step) {
    return operand_at(values, T::kFp8 ? 32 * step : 16 * kPanelBytes * step);
  }

  __device__ SharedOperand key_operand(int tile) const {
    return shared_operand(shared_address(memory_.keys[keys_.stage(tile - tile_begin_)]), T::kRowSwizzle, 8 * T::kRowBytes);
  }

  __device__ SharedOperand value_operand(int tile) const {
    return shared_operand(shared_address(memory_.values[values_.stage(tile - tile_begin_)]), Swizzle::k128,
                        8 * kPanelBytes, T::kTileKeys * kPanelBytes);
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
      bool const cached = tile < cached_tiles_;
      int const rows = cached ? cached_ - tile * T::kTileKeys : prefix_ - cached_ - (tile - cached_tiles_) * T::kTileKeys;
      clear_values(tile, rows, T::kTileKeys);
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

  // ---- turns and releases ----

  __device__ void begin_turn() { named_barrier_sync(kTurnBarrier + warpgroup_, 256); }
  __device__ void end_turn() { named_barrier_arrive(kTurnBarrier + (warpgroup_ + 1) % T::kConsumers, 256); }
  __device__ void sync_warpgroup() { named_barrier_sync(kWarpgroupBarrier + warpgroup_, 128); }

  // Every warp tells the producer that it is done with a stage.
  __device__ void release(uint64_t* empty) {
    __syncwarp();
    if (thread_ % 32 == 0) barrier_arrive(empty);
  }

  __device__ void release_key(int tile) { release(&memory_.key_empty[keys_.stage(tile - tile_begin_)]); }
  __device__ void release_value(int tile) { release(&memory_.value_empty[values_.stage(tile - tile_begin_)]); }

  // ---- split items ----

  // Leaves this part's sums in the workspace. Whoever comes last adds all parts, in their order, and stores.
  __device__ bool add_parts(ItemSlot const& slot) {
    if (rows_ == 0) return false;
    int const part = slot.item.part & 0xFFFF;
    float* const sums = split_sums(slot, part);
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) sums[i * 128 + thread_] = out_[i];
    __threadfence();
    sync_warpgroup();
    int32_t* const arrived = split_.arrived + split_index(slot, 0);
    if (thread_ == 0) {
      bool const last = atomicAdd(arrived, 1) == parts_ - 1;
      if (last) *arrived = 0;
      memory_.last_part[warpgroup_] = last;
    }
    sync_warpgroup();
    if (!memory_.last_part[warpgroup_]) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) out_[i] = 0.f;
    for (int p = 0; p < parts_; ++p) {
      float const* const other = split_sums(slot, p);
#pragma unroll
      for (int i = 0; i < T::kDim / 2; ++i) out_[i] += __ldcg(other + i * 128 + thread_);
    }
    return true;
  }

  __device__ size_t split_index(ItemSlot const& slot, int part) const {
    return (static_cast<size_t>(slot.item.group + part) * params_.heads + slot.head) * T::kConsumers + warpgroup_;
  }
  __device__ float* split_sums(ItemSlot const& slot, int part) const {
    return split_.sums + split_index(slot, part) * (kBlockRows * T::kDim);
  }

  // ---- output ----

  __device__ void store_output(ItemSlot const& slot, int query_slot) {
    if (rows_ == 0) return;
    float factor = 1.f;
    if constexpr (T::kFp8) factor = params_.v_scale[scale_index(slot.head)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const fragment = fragment_row(thread_) + 8 * half;
      float const scale = factor * output_scale(params_, slot.item.user, row_ + min(fragment, rows_ - 1));
#pragma unroll
      for (int j = 0; j < T::kDim / 8; ++j) {
        out_[4 * j + 2 * half] *= scale;
        out_[4 * j + 2 * half + 1] *= scale;
      }
    }
    int64_t const offset = row_ * params_.out.row_stride + slot.head * params_.out.head_stride;
    unsigned char* const staging = T::kFp8 ? memory_.output + warpgroup_ * kBlockRows * T::kDim * 2
                                           : memory_.queries[query_slot] + warpgroup_ * T::kQueryBlockBytes;
    switch (params_.output_type) {
      case DataType::kFloat16: return store_halves(static_cast<__half*>(params_.out.data) + offset, staging);
      case DataType::kBFloat16: return store_halves(static_cast<__nv_bfloat16*>(params_.out.data) + offset, staging);
      default: return store_floats(static_cast<float*>(params_.out.data) + offset);
    }
  }

  // Each warp passes its 16 rows through shared memory, [panel of 64 dims][row][128 bytes] with 16-byte chunks swizzled
  // by the row, so that rows reach memory in full.
  template <class Output>
  __device__ void store_halves(Output* out, unsigned char* staging) {
    int const lane = thread_ % 32, warp_row = thread_ / 32 * 16;
    uint32_t const base = shared_address(staging);
    auto chunk_at = [](int row, int chunk) {
      return (chunk / 8 * kBlockRows + row) * kPanelBytes + (chunk % 8 ^ row % 8) * 16;
    };
    // Products of the whole warpgroup read the queries that stood here.
    sync_warpgroup();
#pragma unroll
    for (int j = 0; j < T::kDim / 8; j += 2) {
      int const row = warp_row + lane % 16, chunk = j + lane / 16;
      store_matrices(base + chunk_at(row, chunk), pack_pair<Output>(out_[4 * j], out_[4 * j + 1]),
                     pack_pair<Output>(out_[4 * j + 2], out_[4 * j + 3]), pack_pair<Output>(out_[4 * j + 4], out_[4 * j + 5]),
                     pack_pair<Output>(out_[4 * j + 6], out_[4 * j + 7]));
    }
    __syncwarp();
    constexpr int kChunks = T::kDim / 8;
#pragma unroll
    for (int i = lane; i < 16 * kChunks; i += 32) {
      int const row = warp_row + i / kChunks, chunk = i % kChunks;
      if (row < rows_) {
        uint4 const data = *reinterpret_cast<uint4 const*>(staging + chunk_at(row, chunk));
        *reinterpret_cast<uint4*>(out + row * params_.out.row_stride + chunk * 8) = data;
      }
    }
    // The copy engine writes here next.
    fence_shared_for_async();
  }

  __device__ void store_floats(float* out) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = fragment_row(thread_) + 8 * half;
      if (row >= rows_) continue;
      float* const to = out + row * params_.out.row_stride + thread_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < T::kDim / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {out_[4 * j + 2 * half], out_[4 * j + 2 * half + 1]};
      }
    }
  }

  __device__ int scale_index(int head) const { return params_.scale_count == 1 ? 0 : head; }

  AttentionParams const& params_;
  SplitWorkspace const& split_;
  SharedMemory<T>& memory_;
  int const warpgroup_, thread_;

  Pipeline<T::kQuerySlots> queries_;
  Pipeline<T::kStages> keys_, values_;

  int tile_begin_, tile_end_, parts_;
  int cached_, prefix_, cached_tiles_, prefix_tiles_;
  bool is_candidate_;
  int rows_, position_, row_;  // rows of the block; position and row in q of its first
  KeyRange common_;
  int needed_begin_, needed_end_;
  SharedOperand query_operand_;
  float half_alpha_;

  float scores_[kScores];
  uint32_t probabilities_[kSteps][4];  // SiLU of the scores: the left operand of the products with values
  float out_[T::kDim / 2];
};

}  // namespace hstu_trt::sm90
