// SPDX-License-Identifier: Apache-2.0
// What a consumer warpgroup does with the tiles of an item: products with their keys, SiLU, products with their values.
#pragma once

#include "sm90_consumer.cuh"

namespace hstu_trt::sm90 {

// ---- the tiles of an item ----

template <class T>
__device__ void Consumer<T>::multiply_tiles() {
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

template <class T>
__device__ void Consumer<T>::skip_tile(int tile) {
  begin_turn();
  end_turn();
  wait_key(tile);
  release_key(tile);
  wait_value(tile);
  release_value(tile);
}

// One operand: SiLU of a tile waits in the scores' registers until the products that read the operand have ended.
template <class T>
__device__ void Consumer<T>::next_tile(int tile) {
  start_tile(tile, operands_[0]);
  apply_silu(tile);
  products_wait<0>();
  pin(out_);
  release_value(tile - 1);
  pack_fragments<Element>(scores_, operands_[0]);
}

// Two operands: tiles fill them by turns, and products never wait for SiLU. Returns the tile behind the last.
template <class T>
__device__ int Consumer<T>::multiply_by_turns(int tile) {
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

template <class T>
__device__ void Consumer<T>::first_tile(int tile) {
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
template <class T>
__device__ void Consumer<T>::start_tile(int tile, Operand& before) {
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

template <class T>
__device__ void Consumer<T>::finish_tile(int tile, Operand& scores) {
  prepare_values(tile);
  multiply_values(tile, scores);
  products_wait<0>();
  pin(out_);
  release_value(tile);
}

// ---- products ----

// S = Q K^T, in flight when this returns.
template <class T>
__device__ void Consumer<T>::multiply_keys(int tile) {
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
template <class T>
__device__ void Consumer<T>::multiply_values(int tile, Operand& scores) {
  SharedOperand const values = value_operand(tile);
  pin(scores);
  products_begin();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_left(out_, scores[step], value_at(values, step));
  }
  products_commit();
}

template <class T>
__device__ void Consumer<T>::multiply_left(float (&out)[T::kDim / 2], uint32_t const (&scores)[4],
                                           SharedOperand values) {
  if constexpr (T::kFp8) {
    Wgmma<Element, T::kDim>::left(out, scores, values);
  } else {
    Wgmma<Element, T::kDim>::left_rows(out, scores, values);
  }
}

// Queries are read once instead of once per tile: the tensor cores then leave shared memory to the copy engine.
template <class T>
__device__ void Consumer<T>::load_queries(int query_slot) {
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

// ---- the candidates' own keys ----

// The 64 x 64 square on the diagonal of this block.
template <class T>
__device__ void Consumer<T>::multiply_self(int tile) {
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
  mask_scores(scores, own_keys_of_rows().row, 0, thread_);
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
template <class T>
__device__ uint32_t Consumer<T>::self_row() const {
  return warpgroup_ % T::kSelfBlocks * kBlockRows;
}

// ---- scores ----

// SiLU of a tile's scores; 0 where a row does not see a key. With one operand, SiLU stands in both branches: behind
// them, the compiler would move it past the next wait for products.
template <class T>
__device__ void Consumer<T>::apply_silu(int tile) {
  bool const edge = is_edge(tile);
  if (edge) {
    mask_scores(scores_, keys_of_rows(tile).row, keys_of_tile(tile).first, thread_);
    if constexpr (T::kOperands == 1) silu(scores_, half_alpha_);
  }
  if (T::kOperands == 2 || !edge) silu(scores_, half_alpha_);
}

// ---- operands in shared memory ----

template <class T>
__device__ SharedOperand Consumer<T>::query_at(int step) const {
  return panel_step(query_operand_, step, kBlockRows);
}

template <class T>
__device__ SharedOperand Consumer<T>::key_at(SharedOperand keys, int step) {
  return panel_step(keys, step, T::kTileKeys);
}

template <class T>
__device__ SharedOperand Consumer<T>::panel_step(SharedOperand operand, int step, int panel_rows) {
  constexpr int kStepsPerPanel = T::kRowBytes / 32;
  return operand_at(operand, step / kStepsPerPanel * panel_rows * T::kRowBytes + step % kStepsPerPanel * 32);
}

// Halves: 16 rows of keys are a step, panels of 64 dims lie side by side. fp8: rows are dims, 32 keys a step.
template <class T>
__device__ SharedOperand Consumer<T>::value_at(SharedOperand values, int step) {
  return operand_at(values, T::kFp8 ? 32 * step : 16 * kPanelBytes * step);
}

template <class T>
__device__ SharedOperand Consumer<T>::key_operand(int tile) const {
  return shared_operand(shared_address(memory_.keys[keys_.stage(tile - tile_begin_)]), T::kRowSwizzle,
                        8 * T::kRowBytes);
}

template <class T>
__device__ SharedOperand Consumer<T>::value_operand(int tile) const {
  return shared_operand(shared_address(memory_.values[values_.stage(tile - tile_begin_)]), T::kValueSwizzle,
                        8 * T::kValueRowBytes, T::kTileKeys * kPanelBytes);
}

}  // namespace hstu_trt::sm90
