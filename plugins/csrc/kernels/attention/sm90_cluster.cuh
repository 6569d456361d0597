// SPDX-License-Identifier: Apache-2.0
// Few queries over a cache: the parts of an item are computed by the CTAs of one cluster, which add up their sums in
// shared memory. Bound by memory, so keys come in smaller tiles, more of them in flight; and no list is made first:
// every CTA finds its items from the offsets.
#pragma once

#include "items.cuh"
#include "sm90.cuh"

namespace hstu_trt::sm90 {

constexpr int kPlannedTileKeys = 128;  // of the plan for this head width

template <class T>
using ItemShape = Shape<T::kConsumers, T::kTileKeys, T::kSelfTiles>;

// Sums on their way between the CTAs of a cluster. Of the 16 chunks of 8 columns of an item's two blocks, every CTA
// stores its share: it gets the others' sums, a float4 per thread and chunk.
template <int kParts>
struct ClusterExchange {
  static constexpr int kOwners = kParts / 2;        // CTAs that share the columns of a block
  static constexpr int kShare = 128 / 8 / kOwners;  // chunks that each of them stores
  alignas(16) float4 sums[(kParts - 1) * kShare][128];
  uint64_t full;      // the others' sums are here
  uint64_t empty[2];  // by warpgroup: those who get its sums have room again

  static __device__ bool owns(int rank, int warpgroup) { return rank / kOwners == warpgroup; }
  // Where a CTA gets a part's sums of its first chunk.
  static __device__ int slot(int part, int owner) { return (part < owner ? part : part - 1) * kShare; }
};

template <class Element, int kTileKeys, int kParts>
struct ClusterTraits : Traits<Element, 128, kTileKeys, 2, 4, 4, 1, 1, false> {
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;
  static constexpr int kClusterParts = kParts;
  static constexpr int kPrefetchTiles = 4;
  using Exchange = ClusterExchange<kParts>;
};

// Shares out the sums of a warpgroup's block: each CTA that stores some of its columns gets the sums of all others. In
// which order they come does not matter, they are added in the order of the parts. Returns the columns that this CTA
// holds the total of.
template <class T>
__device__ typename Consumer<T>::ChunkRange Consumer<T>::exchange_parts() {
  using Exchange = typename T::Exchange;
  constexpr int kShare = Exchange::kShare, kOwners = Exchange::kOwners;
  Exchange& exchange = memory_.exchange;
  int const rank = cluster_rank(), first_owner = warpgroup_ * kOwners;
  bool const owns = Exchange::owns(rank, warpgroup_);
  if (exchanges_ > 0) reopen_exchange(rank);
  if (owns && thread_ == 0) {
    barrier_arrive_expect(&exchange.full, (T::kClusterParts - 1) * kShare * sizeof(exchange.sums[0]));
  }
#pragma unroll
  for (int i = 0; i < kOwners; ++i) {
    int const owner = first_owner + i;
    if (owner == rank) continue;
    uint32_t const to = cluster_address(&exchange.sums[Exchange::slot(rank, owner)][thread_], owner);
    uint32_t const full = cluster_address(&exchange.full, owner);
#pragma unroll
    for (int chunk = 0; chunk < kShare; ++chunk) {
      float const* const sums = out_ + 4 * (i * kShare + chunk);
      cluster_store(to + chunk * sizeof(exchange.sums[0]), sums[0], sums[1], sums[2], sums[3], full);
    }
  }
  uint32_t const parity = exchanges_++ & 1;
  if (!owns) return {0, 0};
  barrier_wait(&exchange.full, parity);
#pragma unroll
  for (int i = 0; i < kOwners; ++i) {
    if (first_owner + i == rank) add_others(rank, out_ + 4 * i * kShare);
  }
  int const first = (rank - first_owner) * kShare;
  return {first, first + kShare};
}

// Adds the other parts' sums to this one's, all in the order of the parts.
template <class T>
__device__ void Consumer<T>::add_others(int rank, float* sums) {
  using Exchange = typename T::Exchange;
#pragma unroll
  for (int chunk = 0; chunk < Exchange::kShare; ++chunk) {
    float total[4] = {};
#pragma unroll
    for (int part = 0; part < T::kClusterParts; ++part) {
      float4 theirs{sums[4 * chunk], sums[4 * chunk + 1], sums[4 * chunk + 2], sums[4 * chunk + 3]};
      if (part != rank) theirs = memory_.exchange.sums[Exchange::slot(part, rank) + chunk][thread_];
      total[0] += theirs.x, total[1] += theirs.y, total[2] += theirs.z, total[3] += theirs.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[4 * chunk + i] = total[i];
  }
}

// From the second item on: those who got sums say that they have read them, those who sent them wait for that. Only
// here, where all CTAs of the cluster are known to be at another item.
template <class T>
__device__ void Consumer<T>::reopen_exchange(int rank) {
  using Exchange = typename T::Exchange;
  bool const owns = Exchange::owns(rank, warpgroup_);
  uint64_t* const empty = &memory_.exchange.empty[warpgroup_];
  sync_warpgroup();
  if (owns && thread_ < T::kClusterParts && thread_ != rank) {
    cluster_barrier_arrive(cluster_address(empty, thread_));
  }
  if (Exchange::kOwners > 1 || !owns) cluster_barrier_wait(empty, exchanges_ - 1 & 1);
}

template <class T>
__device__ void init_exchange(typename T::Exchange& exchange) {
  using Exchange = typename T::Exchange;
  barrier_init(&exchange.full, 1);
  for (int w = 0; w < T::kConsumers; ++w) {
    int const others = Exchange::kOwners - Exchange::owns(cluster_rank(), w);
    barrier_init(&exchange.empty[w], max(1, others));
  }
  barrier_init_fence();
}

// The tiles of this CTA's part of an item.
template <class T>
__device__ TileRange cluster_tiles(AttentionParams const& params, UserShape const& rows, ItemBlocks const& blocks) {
  TileRange const tiles = item_tiles<ItemShape<T>>(params, rows, blocks);
  int const planned = (tiles.end - tiles.begin) * T::kTileKeys / kPlannedTileKeys;
  int const parts = parts_of_item(T::kClusterParts, planned), rank = cluster_rank();
  return rank < parts ? tiles_of_part<T::kClusterParts>(tiles, rank, parts) : TileRange{tiles.end, tiles.end};
}

// Grid: [items][heads][parts], a cluster being the parts of an item and head. Should there be more items, clusters take
// every so many of them. One warp finds them in the list of all users' items, a user per lane; all CTAs of a cluster
// find the same ones, and take a part of the tiles each.
template <class T>
__device__ void schedule_cluster_items(AttentionParams const& params, SharedMemory<T>& memory) {
  using S = ItemShape<T>;
  int const lane = threadIdx.x % 32;
  uint32_t count = 0;
  auto wait_for_slot = [&] {
    if (count >= kItemSlots) barrier_wait(&memory.item_empty[count % kItemSlots], count / kItemSlots - 1 & 1);
  };
  int item = blockIdx.z, before = 0;
  for (int first_user = 0; first_user < params.users; first_user += 32) {
    int const user = first_user + lane;
    UserShape const rows = user < params.users ? user_shape(params, user) : UserShape{};
    UserItems<S> const items(rows);
    int const own = items.count();
    int end = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int const other = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += other;
    }
    int const total = __shfl_sync(~0u, end, 31);
    for (; item < before + total; item += gridDim.z, ++count) {
      wait_for_slot();
      int const index = item - before - (end - own);
      if (index >= 0 && index < own) {
        ItemBlocks const blocks = item_blocks<S>(items, index);
        TileRange const tiles = cluster_tiles<T>(params, rows, blocks);
        ItemSlot& slot = memory.items[count % kItemSlots];
        slot.item.user = user;
        slot.item.rows = rows;
        for (int i = 0; i < T::kConsumers; ++i) slot.item.blocks[i] = slot_block(blocks, i);
        slot.item.tile_begin = tiles.begin;
        slot.item.tile_end = tiles.end;
        slot.head = blockIdx.y;
        barrier_arrive(&memory.item_full[count % kItemSlots]);
      }
      __syncwarp();
    }
    before += total;
  }
  wait_for_slot();
  if (lane == 0) {
    memory.items[count % kItemSlots].head = -1;
    barrier_arrive(&memory.item_full[count % kItemSlots]);
  }
}

// What follows runs while the kernel before ends, which may still write anything: nothing is read but to know what to
// bring into L2, and there all see what is written later. An offset that is about to change costs a useless copy; the
// copy engine leaves out what lies outside of a tensor.

// What is read first, and where it lies into the TLB.
inline __device__ void prefetch_inputs(AttentionParams const& params) {
  constexpr int kSectorInts = 8;
  int const at = threadIdx.x % 32 * kSectorInts;
  if (at <= params.users) {
    prefetch_line(params.query_offsets + at);
    prefetch_line(params.prefix_offsets + at);
    prefetch_line(params.candidate_offsets + at);
  }
  if (at > 0) return;
  if (params.norm) prefetch_line(params.norm);
  if (params.q_scale) {
    prefetch_line(params.q_scale);
    prefetch_line(params.k_scale);
    prefetch_line(params.v_scale);
  }
}

// The first tiles of this CTA's part, as if every user had one item: memory is idle while the last sums are added up.
template <class T>
__device__ void prefetch_first_tiles(AttentionParams const& params, TensorMaps const& maps) {
  int const user = blockIdx.z, head = blockIdx.y;
  if (params.page_table || user >= params.users) return;
  int const cached_row = load_relaxed(&params.cached_offsets[user]);
  int const cached = load_relaxed(&params.cached_offsets[user + 1]) - cached_row;
  int const tiles = ceil_div(max(0, cached), T::kTileKeys);
  int const first = (tiles + T::kSelfTiles) * cluster_rank() / T::kClusterParts;
#pragma unroll 1
  for (int tile = first; tile < min(first + T::kPrefetchTiles, tiles); ++tile) {
    int const row = cached_row + tile * T::kTileKeys;
#pragma unroll 1
    for (int panel = 0; panel < T::kPanels; ++panel) {
      for (int box = 0; box < T::kTileKeys; box += T::kKeyBoxRows) {
        tma_prefetch(&maps.cached_key, panel * T::kPanelElements, row + box, head);
        if (!T::kFp8) tma_prefetch(&maps.cached_value, panel * T::kPanelElements, row + box, head);
      }
    }
    if (T::kFp8) {
      int const block = first_value_block(cached_row, user) + tile * T::kTileKeys / kValueBlockKeys;
      tma_prefetch(&maps.cached_value, tile * T::kTileKeys % kValueBlockKeys, 0, block * params.heads + head);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    cluster_kernel(__grid_constant__ AttentionParams const params, __grid_constant__ TensorMaps const maps) {
  extern __shared__ unsigned char raw_memory[];
  auto& memory = *reinterpret_cast<SharedMemory<T>*>(raw_memory);
  if (threadIdx.x == 0) {
    init_barriers(memory);
    init_exchange<T>(memory.exchange);
  }
  if (threadIdx.x == 32) prefetch_tensor_maps(maps);
  if (threadIdx.x / 32 == 2) prefetch_inputs(params);
  __syncthreads();
  cluster_arrive();
  int const warpgroup = uniform(threadIdx.x / 128);
  SplitWorkspace const none{};
  if (warpgroup == 0) {
    registers_shrink<T::kProducerRegisters>();
    if (threadIdx.x == 96) prefetch_first_tiles<T>(params, maps);
    if (threadIdx.x >= 64) return;
    wait_for_previous_kernel();
    allow_next_kernel();
    if (threadIdx.x == 0) load_items<T>(params, maps, none, memory);
    if (threadIdx.x >= 32) schedule_cluster_items<T>(params, memory);
  } else {
    registers_grow<T::kConsumerRegisters>();
    wait_for_previous_kernel();
    // Others' barriers are ready when they have arrived.
    cluster_wait();
    Consumer<T>(params, none, memory, warpgroup - 1).run();
  }
}

template <class T>
cudaError_t launch_cluster_kernel(AttentionParams const& params, int items, cudaStream_t stream) {
  constexpr unsigned kParts = T::kClusterParts;
  TensorMaps maps{};
  if (!make_tensor_maps<T>(params, maps)) return cudaErrorInvalidValue;
  auto* const kernel = cluster_kernel<T>;
  int const bytes = sizeof(SharedMemory<T>);
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // The prologue may overlap any kernel: nothing is read or written in it but this CTA's shared memory.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kParts, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kParts, params.heads, items);
  config.blockDim = T::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, params, maps);
}

}  // namespace hstu_trt::sm90

// Defines what launchers.h declares for one element type.
#define HSTU_SM90_CLUSTER_INSTANTIATE(Element, kTileKeys)                                                          \
  namespace hstu_trt::sm90 {                                                                                       \
  template <>                                                                                                      \
  cudaError_t launch_clusters<Element>(AttentionParams const& params, int items, int parts, cudaStream_t stream) { \
    switch (parts) {                                                                                               \
      case 2: return launch_cluster_kernel<ClusterTraits<Element, kTileKeys, 2>>(params, items, stream);           \
      case 4: return launch_cluster_kernel<ClusterTraits<Element, kTileKeys, 4>>(params, items, stream);           \
      case 8: return launch_cluster_kernel<ClusterTraits<Element, kTileKeys, 8>>(params, items, stream);           \
      default: return cudaErrorInvalidValue;                                                                       \
    }                                                                                                              \
  }                                                                                                                \
  }
