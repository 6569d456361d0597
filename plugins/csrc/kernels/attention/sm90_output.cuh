// SPDX-License-Identifier: Apache-2.0
// The end of an item in a consumer warpgroup: adding up the parts of a split item, scaling, storing.
#pragma once

#include "sm90_consumer.cuh"

namespace hstu_trt::sm90 {

// Adds up the parts of an item, in their order. Whoever comes last does so: it keeps its sums in registers and waits
// for those who came before it to have written theirs. True for the last one, which holds the total.
template <class T>
__device__ bool Consumer<T>::add_parts() {
  int const parts = slot_->item.part >> 16, own = slot_->item.part & 0xFFFF;
  SplitCounters* const counters = split_.counters + split_index(0);
  if (thread_ == 0) memory_.last_part[warpgroup_] = atomicAdd(&counters->arrived, 1) == parts - 1;
  sync_warpgroup();
  if (!memory_.last_part[warpgroup_]) {
    float* const sums = split_sums(own);
#pragma unroll
    for (int i = 0; i < T::kDim / 2; ++i) __stcg(sums + i * 128 + thread_, out_[i]);
    __threadfence();
    sync_warpgroup();
    if (thread_ == 0) atomicAdd(&counters->written, 1);
    return false;
  }
  if (thread_ == 0) {
    while (atomicAdd(&counters->written, 0) != parts - 1) __nanosleep(40);
    *counters = {0, 0};
  }
  sync_warpgroup();
  __threadfence();
  constexpr int kChunk = 8;  // as many registers as are free
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

template <class T>
__device__ void Consumer<T>::store_output(int query_slot) {
  int const row = first_row_ + (is_candidate_ ? slot_->item.rows.query_candidate_row : slot_->item.rows.query_row);
  float factor = 1.f;
  if constexpr (T::kFp8) factor = params_.v_scale[scale_index(slot_->head)];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const fragment = fragment_row(thread_) + 8 * half;
    float const scale = factor * output_scale(params_, slot_->item.user, row + min(fragment, rows_ - 1));
#pragma unroll
    for (int j = 0; j < T::kDim / 8; ++j) {
      out_[4 * j + 2 * half] *= scale;
      out_[4 * j + 2 * half + 1] *= scale;
    }
  }
  int64_t const offset = row * params_.out.row_stride + slot_->head * params_.out.head_stride;
  unsigned char* const staging =
      T::kFp8 ? memory_.output + warpgroup_ * kBlockRows * T::kDim * 2 : query_block(query_slot);
  switch (params_.output_type) {
    case DataType::kFloat16: return store_halves(static_cast<__half*>(params_.out.data) + offset, staging);
    case DataType::kBFloat16: return store_halves(static_cast<__nv_bfloat16*>(params_.out.data) + offset, staging);
    default: return store_floats(static_cast<float*>(params_.out.data) + offset);
  }
}

// Each warp passes its 16 rows through shared memory, [panel of 64 dims][row][128 bytes] with 16-byte chunks swizzled
// by the row, so that rows reach memory in full.
template <class T>
template <class Output>
__device__ void Consumer<T>::store_halves(Output* out, unsigned char* staging) {
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
                   pack_pair<Output>(out_[4 * j + 2], out_[4 * j + 3]),
                   pack_pair<Output>(out_[4 * j + 4], out_[4 * j + 5]),
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

template <class T>
__device__ void Consumer<T>::store_floats(float* out) {
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

}  // namespace hstu_trt::sm90
