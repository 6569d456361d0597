// SPDX-License-Identifier: Apache-2.0
// The scheduler: one thread that takes items from the plan before they are needed.
#pragma once

#include "../common/ptx.cuh"
#include "sm90_traits.cuh"

namespace hstu_trt::sm90 {

template <class T>
__device__ void schedule_items(AttentionParams const& params, SharedMemory<T>& memory) {
  auto* const header = static_cast<PlanHeader*>(params.workspace);
  auto const* const items = reinterpret_cast<WorkItem const*>(header + 1);
  int const work = header->num_items * params.heads;
  uint32_t const ahead = header->claim_ahead;
  for (uint32_t count = 0;; ++count) {
    if (count >= ahead) {
      uint32_t const done = count - ahead;
      barrier_wait(&memory.item_empty[done % kItemSlots], done / kItemSlots & 1);
    }
    int const index = count == 0 ? blockIdx.x : gridDim.x + atomicAdd(&header->next_item, 1);
    ItemSlot& slot = memory.items[count % kItemSlots];
    if (index >= work) {
      slot.head = -1;
      barrier_arrive(&memory.item_full[count % kItemSlots]);
      break;
    }
    alignas(16) WorkItem item;
    copy_item(&items[index / params.heads], &item);
    slot.item = item;
    slot.head = index % params.heads;
    barrier_arrive(&memory.item_full[count % kItemSlots]);
  }
  if (atomicAdd(&header->finished_ctas, 1) == gridDim.x - 1) header->next_item = header->finished_ctas = 0;
}

}  // namespace hstu_trt::sm90
