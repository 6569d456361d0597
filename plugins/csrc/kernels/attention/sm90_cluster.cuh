// SPDX-License-Identifier: Apache-2.0
// Few queries over a cache: the parts of an item are computed by the CTAs of one cluster, which add up their sums in
// shared memory. Bound by memory, so keys come in smaller tiles, more of them in flight; and no list is made first:
// every CTA finds its items from the offsets.
#pragma once

#include "items.cuh"
#include "sm90.cuh"

namespace hstu_trt::sm90 {

constexpr int kPlannedTileKeys = 128;  // of the plan for this head width
constexpr int kMaxClusterParts = 8;    // the largest cluster that every GPU of this kind runs

// Sums on their way between the CTAs of a cluster. Of the 2 x 16 chunks of 8 columns of an item's two blocks, every CTA
// stores its share: it gets the others' sums, a float4 per thread and chunk.
struct ClusterExchange {
  static constexpr int kChunks = 2 * 16;
  alignas(16) float4 sums[(kMaxClusterParts - 1) * kChunks / kMaxClusterParts][128];
  uint64_t full;      // the others' sums are here
  uint64_t empty[2];  // by warpgroup: those who get its sums have room again
};

template <class Element, int kTileKeys>
struct ClusterTraits : Traits<Element, 128, kTileKeys, 2, 4, 4, 1, 1, false> {
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;
  static constexpr int kClusterParts = kMaxClusterParts;
  using Exchange = ClusterExchange;
};

// Shares out the sums of a warpgroup's block: each CTA that stores some of its columns gets the sums of all others. In
// which order they come does not matter, they are added in the order of the parts. Returns the columns that this CTA
// holds the total of.
template <class T>
__device__ typename Consumer<T>::ChunkRange Consumer<T>::exchange_parts() {
  int const parts = cluster_size(), rank = cluster_rank();
  // CTA `rank` stores chunks of block rank / owners.
  int const owners = parts / 2, share = T::kDim / 8 / owners;
  bool const owns = rank / owners == warpgroup_;
  ClusterExchange& exchange = memory_.exchange;
  if (exchanges_ > 0) reopen_exchange(rank, parts, owners);
  if (owns && thread_ == 0) barrier_arrive_expect(&exchange.full, (parts - 1) * share * sizeof(exchange.sums[0]));
#pragma unroll
  for (int chunk = 0; chunk < T::kDim / 8; ++chunk) {
    int const owner = warpgroup_ * owners + chunk / share;
    if (owner == rank) continue;
    int const slot = (rank < owner ? rank : rank - 1) * share + chunk % share;
    cluster_store(cluster_address(&exchange.sums[slot][thread_], owner), out_[4 * chunk], out_[4 * chunk + 1],
                  out_[4 * chunk + 2], out_[4 * chunk + 3], cluster_address(&exchange.full, owner));
  }
  uint32_t const parity = exchanges_++ & 1;
  if (!owns) return {0, 0};
  int const first = rank % owners * share;
  barrier_wait(&exchange.full, parity);
#pragma unroll
  for (int chunk = 0; chunk < T::kDim / 8; ++chunk) {
    if (chunk < first || chunk >= first + share) continue;
    float total[4] = {};
    for (int part = 0; part < parts; ++part) {
      float4 const sums = part == rank ? float4{out_[4 * chunk], out_[4 * chunk + 1], out_[4 * chunk + 2], out_[4 * chunk + 3]}
                                       : exchange.sums[(part < rank ? part : part - 1) * share + chunk - first][thread_];
      total[0] += sums.x, total[1] += sums.y, total[2] += sums.z, total[3] += sums.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out_[4 * chunk + i] = total[i];
  }
  return {first, first + share};
}

// From the second item on: those who got sums say that they have read them, those who sent them wait for that. Only
// here, where all CTAs of the cluster are known to be at another item.
template <class T>
__device__ void Consumer<T>::reopen_exchange(int rank, int parts, int owners) {
  bool const owns = rank / owners == warpgroup_;
  uint64_t* const empty = &memory_.exchange.empty[warpgroup_];
  sync_warpgroup();
  if (owns && thread_ < parts && thread_ != rank) cluster_barrier_arrive(cluster_address(empty, thread_));
  if (owners > owns) cluster_barrier_wait(empty, exchanges_ - 1 & 1);
}

template <class T>
__device__ void init_exchange(ClusterExchange& exchange) {
  int const owners = cluster_size() / 2;
  barrier_init(&exchange.full, 1);
  for (int w = 0; w < T::kConsumers; ++w) {
    barrier_init(&exchange.empty[w], max(1, owners - (cluster_rank() / owners == w)));
  }
  barrier_init_fence();
}

// Items are cut where the plan would cut them, at its tiles of 128 keys: the bits are then those of as many parts there.
template <class T>
__device__ TileRange cluster_tiles(AttentionParams const& params, UserShape const& rows, ItemBlocks const& blocks) {
  using Planned = Shape<T::kConsumers, kPlannedTileKeys, 1>;
  constexpr int kRatio = kPlannedTileKeys / T::kTileKeys;
  TileRange const tiles = item_tiles<Planned>(params, rows, blocks);
  int const parts = parts_of_item(cluster_size(), tiles.end - tiles.begin), rank = cluster_rank();
  TileRange const part = rank < parts ? tiles_of_part(tiles, rank, parts) : TileRange{tiles.end, tiles.end};
  int const fresh = rows.prefix - rows.cached;
  int const cached_tiles = ceil_div(rows.cached, T::kTileKeys), planned_cached = ceil_div(rows.cached, kPlannedTileKeys);
  int const all_tiles = cached_tiles + ceil_div(fresh, T::kTileKeys),
            planned_all = planned_cached + ceil_div(fresh, kPlannedTileKeys);
  auto own = [&](int tile) {
    if (tile < planned_cached) return tile * kRatio;
    if (tile < planned_all) return cached_tiles + (tile - planned_cached) * kRatio;
    return all_tiles + (tile - planned_all) * T::kSelfTiles;
  };
  return {own(part.begin), own(part.end)};
}

// One warp finds the items of its cluster, every so many of the list of all users' items, a user per lane. All CTAs of
// a cluster find the same ones, and take a part of the tiles each.
template <class T>
__device__ void schedule_cluster_items(AttentionParams const& params, SharedMemory<T>& memory) {
  using S = Shape<T::kConsumers, T::kTileKeys, T::kSelfTiles>;
  int const clusters = gridDim.x / cluster_size(), lane = threadIdx.x % 32;
  uint32_t count = 0;
  auto wait_for_slot = [&] {
    if (count >= kItemSlots) barrier_wait(&memory.item_empty[count % kItemSlots], count / kItemSlots - 1 & 1);
  };
  int work = blockIdx.x / cluster_size(), before = 0;
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
    for (; work / params.heads < before + total; work += clusters, ++count) {
      wait_for_slot();
      int const index = work / params.heads - before - (end - own);
      if (index >= 0 && index < own) {
        ItemBlocks const blocks = item_blocks<S>(items, index);
        TileRange const tiles = cluster_tiles<T>(params, rows, blocks);
        ItemSlot& slot = memory.items[count % kItemSlots];
        slot.item.user = user;
        slot.item.rows = rows;
        for (int i = 0; i < T::kConsumers; ++i) slot.item.blocks[i] = slot_block(blocks, i);
        slot.item.tile_begin = tiles.begin;
        slot.item.tile_end = tiles.end;
        slot.head = work % params.heads;
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
  __syncthreads();
  cluster_arrive();
  wait_for_previous_kernel();
  allow_next_kernel();
  int const warpgroup = uniform(threadIdx.x / 128);
  SplitWorkspace const none{};
  if (warpgroup == 0) {
    registers_shrink<T::kProducerRegisters>();
    if (threadIdx.x == 0) load_items<T>(params, maps, none, memory);
    if (threadIdx.x / 32 == 1) schedule_cluster_items<T>(params, memory);
  } else {
    registers_grow<T::kConsumerRegisters>();
    // Others' barriers are ready when they have arrived.
    cluster_wait();
    Consumer<T>(params, none, memory, warpgroup - 1).run();
  }
}

template <class T>
cudaError_t launch_cluster_kernel(AttentionParams const& params, int clusters, int parts, cudaStream_t stream) {
  TensorMaps maps{};
  if (!make_tensor_maps<T>(params, maps)) return cudaErrorInvalidValue;
  auto* const kernel = cluster_kernel<T>;
  int const bytes = sizeof(SharedMemory<T>);
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // The prologue may overlap any kernel: nothing is read or written in it but this CTA's shared memory.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(parts), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = clusters * parts;
  config.blockDim = T::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, params, maps);
}

}  // namespace hstu_trt::sm90

// Defines what launchers.h declares for one element type.
#define HSTU_SM90_CLUSTER_INSTANTIATE(Element, kTileKeys)                                                     \
  namespace hstu_trt::sm90 {                                                                                  \
  template <>                                                                                                 \
  cudaError_t launch_clusters<Element>(AttentionParams const& params, int clusters, int parts,                \
                                       cudaStream_t stream) {                                                 \
    return launch_cluster_kernel<ClusterTraits<Element, kTileKeys>>(params, clusters, parts, stream);         \
  }                                                                                                           \
  }
