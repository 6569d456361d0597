// SPDX-License-Identifier: Apache-2.0
// The Hopper kernel and its launch. Read sm90_traits.cuh first, then the consumer.
#pragma once

#include "launchers.h"
#include "sm90_block_tiles.cuh"
#include "sm90_consumer.cuh"
#include "sm90_loader.cuh"
#include "sm90_output.cuh"
#include "sm90_products.cuh"
#include "sm90_scheduler.cuh"
#include "tensor_map.h"

namespace hstu_trt::sm90 {

template <class T>
__device__ void init_barriers(SharedMemory<T>& memory) {
  for (int i = 0; i < kItemSlots; ++i) {
    barrier_init(&memory.item_full[i], 1);
    barrier_init(&memory.item_empty[i], 4 * T::kConsumers);
  }
  for (int i = 0; i < T::kQuerySlots; ++i) {
    barrier_init(&memory.query_full[i], 1);
    barrier_init(&memory.query_empty[i], 4 * T::kConsumers);
  }
  for (int i = 0; i < T::kStages; ++i) {
    barrier_init(&memory.key_full[i], 1);
    barrier_init(&memory.key_empty[i], 4 * T::kConsumers);
  }
  for (int i = 0; i < T::kValueStages; ++i) {
    barrier_init(&memory.value_full[i], 1);
    barrier_init(&memory.value_empty[i], 4 * T::kConsumers);
  }
  barrier_init_fence();
}

// One CTA per multiprocessor takes (item, head) after (item, head) from the plan.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attention_kernel(__grid_constant__ AttentionParams const params, __grid_constant__ TensorMaps const maps,
                     __grid_constant__ SplitWorkspace const split) {
  extern __shared__ unsigned char raw_memory[];
  auto& memory = *reinterpret_cast<SharedMemory<T>*>(raw_memory);
  if (threadIdx.x == 0) init_barriers(memory);
  if (threadIdx.x == 32) prefetch_tensor_maps(maps);
  if (threadIdx.x == 64 && !params.reuse_plan) prefetch_first_keys<T>(params, maps);
  __syncthreads();
  wait_for_previous_kernel();
  int const warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    registers_shrink<T::kProducerRegisters>();
    if (threadIdx.x == 0) load_items<T>(params, maps, split, memory);
    if (threadIdx.x == 32) schedule_items<T>(params, memory);
  } else {
    registers_grow<T::kConsumerRegisters>();
    Consumer<T>(params, split, memory, warpgroup - 1).run();
  }
}

// Bytes behind the plan: sums of split items, and their counters.
template <class T>
size_t split_sums_bytes() {
  return sizeof(float) * kMaxSplitWork * T::kConsumers * kBlockRows * T::kDim;
}
template <class T>
size_t split_counter_bytes() {
  return sizeof(SplitCounters) * kMaxSplitWork;
}

template <class T>
size_t workspace_size(AttentionParams const& params) {
  size_t const split = params.whole_items ? 0 : split_sums_bytes<T>() + split_counter_bytes<T>();
  return plan_size(params, T::plan_shape()) + split;
}

template <class T>
bool make_tensor_maps(AttentionParams const& params, TensorMaps& maps) {
  auto rows = [&](TokenTensor const& tensor, int count, int box_rows) {
    return TensorMapShape{tensor.data,       params.type,        T::kDim,           count,    params.heads,
                          tensor.row_stride, tensor.head_stride, T::kPanelElements, box_rows, T::kRowBytes};
  };
  // [blocks * heads] matrices of kDim rows of 128 keys.
  auto blocks = [&](TokenTensor const& tensor, int count) {
    return TensorMapShape{tensor.data,
                          params.type,
                          kValueBlockKeys,
                          T::kDim,
                          count * params.heads,
                          kValueBlockKeys,
                          kValueBlockKeys * T::kDim,
                          T::kTileKeys,
                          T::kDim,
                          T::kValueRowBytes};
  };
  bool const paged = params.page_table != nullptr;
  int const cached_box = paged ? T::kPagedBoxRows : T::kKeyBoxRows;
  bool made = encode_tensor_map(rows(params.q, params.query_rows, kBlockRows), maps.query) &&
              encode_tensor_map(rows(params.k, params.key_rows, T::kKeyBoxRows), maps.key);
  if (params.cached_k.data)
    made = made && encode_tensor_map(rows(params.cached_k, params.cached_rows, cached_box), maps.cached_key);
  if constexpr (T::kFp8) {
    made = made && encode_tensor_map(blocks(params.v, 2 * value_blocks(params.key_rows, params.users)), maps.value);
    if (params.cached_v.data) {
      int const count = paged ? params.cached_rows / kValueBlockKeys : value_blocks(params.cached_rows, params.users);
      made = made && encode_tensor_map(blocks(params.cached_v, count), maps.cached_value);
    }
  } else {
    made = made && encode_tensor_map(rows(params.v, params.key_rows, T::kKeyBoxRows), maps.value);
    if (params.cached_v.data)
      made = made && encode_tensor_map(rows(params.cached_v, params.cached_rows, cached_box), maps.cached_value);
  }
  return made;
}

template <class T>
SplitWorkspace split_workspace(AttentionParams const& params) {
  auto* const behind_plan = static_cast<unsigned char*>(params.workspace) + plan_size(params, T::plan_shape());
  return {reinterpret_cast<float*>(behind_plan), reinterpret_cast<SplitCounters*>(behind_plan + split_sums_bytes<T>())};
}

template <class T>
cudaError_t plan(AttentionParams const& params, int multiprocessors, cudaStream_t stream) {
  PlanShape shape = T::plan_shape();
  shape.split = !params.whole_items;
  auto* const counters = reinterpret_cast<int32_t*>(split_workspace<T>(params).counters);
  return launch_plan(params, shape, multiprocessors, counters, split_counter_bytes<T>() / sizeof(int32_t), stream);
}

template <class T>
cudaError_t launch(AttentionParams const& params, int multiprocessors, cudaStream_t stream) {
  TensorMaps maps{};
  if (!make_tensor_maps<T>(params, maps)) return cudaErrorInvalidValue;
  auto* const kernel = attention_kernel<T>;
  int const bytes = sizeof(SharedMemory<T>);
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // The prologue overlaps the plan (and the packing of values, which waits for it); behind anything else it must not,
  // since that may still read our outputs.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = multiprocessors;
  config.blockDim = T::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = params.reuse_plan ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, params, maps, split_workspace<T>(params));
}

}  // namespace hstu_trt::sm90

// Defines what launchers.h declares for one element type and head width.
#define HSTU_SM90_INSTANTIATE(Element, kDim)                         \
  namespace hstu_trt::sm90 {                                         \
  template <>                                                        \
  Variant const& variant<Element, kDim>() {                          \
    using T = TraitsFor<Element, kDim>::Type;                        \
    static Variant const one{workspace_size<T>, plan<T>, launch<T>}; \
    return one;                                                      \
  }                                                                  \
  }
