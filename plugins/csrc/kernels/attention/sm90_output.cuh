// SPDX-License-Identifier: Apache-2.0
// The end of an item in a consumer warpgroup: adding up the parts of a split item, scaling, storing.
#pragma once

#include "sm90_consumer.cuh"

namespace hstu_trt::sm90 {

// Adds up the parts of an item, in their order. The last one to come does so: it keeps its sums in registers and waits
// for the others to have written theirs. True for the last one, which holds the total.
template <class T>
__device__ bool Consumer<T>::add_parts() {
  int const parts = slot_->item.part >> 16, own = slot_->item.part & 0xFFFF;
  int32_t* const written = &split_.counters[slot_->item.group * params_.heads + slot_->head].written[warpgroup_];
  if (!slot_->last_part) {
    float* const sums = split_sums(own);
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) __stcg(sums + i * 128 + thread_, out_[i]);
    sync_warpgroup();
    if (thread_ == 0) {
      __threadfence();
      atomicAdd(written, 1);
    }
    return false;
  }
  if (thread_ == 0) {
    while (load_acquire(written) != parts - 1) {
    }
    *written = 0;
  }
  sync_warpgroup();
  constexpr int kChunk = 16;  // loads in flight: more take registers from the loop over tiles
#pragma unroll
  for (int first = 0; first < T::kDim / 2; first += kChunk) {
    float total[kChunk] = {};
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      float const* const sums = split_sums(part) + first * 128 + thread_;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) total[i] += part == own ? out_[first + i] : __ldcg(sums + i * 128);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out_[first + i] = total[i];
    asm volatile("" ::: "memory");
  }
  return true;
}

// What the sums of this thread's two rows are multiplied with.
template <class T>
__device__ typename Consumer<T>::RowScales Consumer<T>::output_scales() const {
  int const row = first_row_ + (is_candidate_ ? slot_->item.rows.query_candidate_row : slot_->item.rows.query_row);
  float const factor = value_scale();
  RowScales scales;
  if constexpr (T::kClusterParts > 1) {
    if (has_scale_of_all(params_)) {
      scales.row[0] = scales.row[1] = factor * scale_of_all_;
      return scales;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const fragment = fragment_row(thread_) + 8 * half;
    scales.row[half] = factor * output_scale(params_, slot_->item.user, row + min(fragment, rows_ - 1));
  }
  return scales;
}

template <class T>
template <class Chunks>
__device__ void Consumer<T>::store_output(int query_slot, RowScales scales, Chunks chunks) {
  int const row = first_row_ + (is_candidate_ ? slot_->item.rows.query_candidate_row : slot_->item.rows.query_row);
#pragma unroll
  for (int i = 0; i < T::kDim / 2; ++i) out_[i] *= scales.row[i / 2 % 2];
  int64_t const offset = row * params_.out.row_stride + slot_->head * params_.out.head_stride;
  unsigned char* const staging = query_block(query_slot);
  switch (params_.output_type) {
    case DataType::kFloat16: return store_halves(static_cast<__half*>(params_.out.data) + offset, staging, chunks);
    case DataType::kBFloat16:
      return store_halves(static_cast<__nv_bfloat16*>(params_.out.data) + offset, staging, chunks);
    default: return store_floats(static_cast<float*>(params_.out.data) + offset, chunks);
  }
}

// Each warp passes its 16 rows through shared memory, [panel][row][128 bytes or fewer] with 16-byte chunks swizzled by
// the row, so that rows reach memory in full.
template <class T>
template <class Output, class Chunks>
__device__ void Consumer<T>::store_halves(Output* out, unsigned char* staging, Chunks chunks) {
  constexpr int kChunks = T::kOutputColumns / 8, kRowChunks = kChunks < 8 ? kChunks : 8;
  int const lane = thread_ % 32, warp_row = thread_ / 32 * 16;
  uint32_t const base = shared_address(staging);
  auto chunk_at = [](int row, int chunk) {
    int const swizzle = kRowChunks == 8 ? row % 8 : row / 2 % 4;
    return ((chunk / kRowChunks * kBlockRows + row) * kRowChunks + (chunk % kRowChunks ^ swizzle)) * 16;
  };
  // Products of the whole warpgroup read the queries that stood here.
  sync_warpgroup();
#pragma unroll
  for (int pass = 0; pass < T::kOutputPasses; ++pass) {
    if (pass > 0) __syncwarp();
#pragma unroll
    for (int j = 0; j < kChunks; j += 2) {
      if (!chunks.holds(pass * kChunks + j)) continue;
      int const row = warp_row + lane % 16, chunk = j + lane / 16;
      float const* const sums = out_ + 4 * (pass * kChunks + j);
      store_matrices(base + chunk_at(row, chunk), pack_pair<Output>(sums[0], sums[1]),
                     pack_pair<Output>(sums[2], sums[3]), pack_pair<Output>(sums[4], sums[5]),
                     pack_pair<Output>(sums[6], sums[7]));
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * kChunks; i += 32) {
      int const row = warp_row + i / kChunks, chunk = i % kChunks;
      if (row < rows_ && chunks.holds(pass * kChunks + chunk)) {
        uint4 const data = *reinterpret_cast<uint4 const*>(staging + chunk_at(row, chunk));
        *reinterpret_cast<uint4*>(out + row * params_.out.row_stride + (pass * kChunks + chunk) * 8) = data;
      }
    }
  }
  // The copy engine writes here next.
  fence_shared_for_async();
}

template <class T>
template <class Chunks>
__device__ void Consumer<T>::store_floats(float* out, Chunks chunks) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = fragment_row(thread_) + 8 * half;
    if (row >= rows_) continue;
    float* const to = out + row * params_.out.row_stride + thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < T::kDim / 8; ++j) {
      if (!chunks.holds(j)) continue;
      *reinterpret_cast<float2*>(to + 8 * j) = {out_[4 * j + 2 * half], out_[4 * j + 2 * half + 1]};
    }
  }
}

}  // namespace hstu_trt::sm90
