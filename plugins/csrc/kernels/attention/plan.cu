// SPDX-License-Identifier: Apache-2.0
// The tile list (plan.h): one CTA counts items, cuts them, sorts them by length and writes them.
#include <algorithm>

#include "../common/ptx.cuh"
#include "items.cuh"

namespace hstu_trt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = 3;           // of item length: few, so that one user's items stay together
constexpr int kUsersInShared = 1024;  // their rows and items stand in shared memory, too

// Where each user's rows are and which of the items are theirs, for as many users as shared memory holds.
struct UsersInShared {
  UserShape rows[kUsersInShared];
  int32_t first_items[kUsersInShared];
};

struct Workspace {
  PlanHeader* header;
  WorkItem* items;
  int32_t* first_items;   // [users]: items before each user
  UserShape const* rows;  // [users], or nullptr: to be read from the offsets

  __device__ Workspace(AttentionParams const& params, int max_items, UsersInShared& shared)
      : header(static_cast<PlanHeader*>(params.workspace)), items(reinterpret_cast<WorkItem*>(header + 1)) {
    bool const few = params.users <= kUsersInShared;
    first_items = few ? shared.first_items : reinterpret_cast<int32_t*>(items + max_items);
    rows = few ? shared.rows : nullptr;
  }
};

// Sum over the threads before this one, and over all.
struct Scan {
  int before, total;
};

__device__ Scan block_scan(int value, int (&warp_sums)[kWarps]) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    int const other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int total = lane < kWarps ? warp_sums[lane] : 0;
#pragma unroll 1
    for (int step = 1; step < kWarps; step *= 2) {
      int const other = __shfl_up_sync(~0u, total, step);
      if (lane >= step) total += other;
    }
    if (lane < kWarps) warp_sums[lane] = total;
  }
  __syncthreads();
  Scan const result{sum - value + (warp > 0 ? warp_sums[warp - 1] : 0), warp_sums[kWarps - 1]};
  __syncthreads();
  return result;
}

// Parts per item that leave the last round of CTAs least idle; fewer where it makes no difference. Each lane of a warp
// tries one number.
__device__ int choose_parts(int items, int heads, int multiprocessors) {
  int const work = items * heads;
  if (work == 0 || 2 * work >= 3 * multiprocessors) return 1;
  int best = threadIdx.x % 32 + 1;
  bool const allowed = best == 1 || work * best <= kMaxSplitWork;
  float time = allowed ? static_cast<float>(ceil_div(work * best, multiprocessors)) / best + 0.02f * best : 1e30f;
#pragma unroll 1
  for (int step = 16; step > 0; step /= 2) {
    float const other_time = __shfl_xor_sync(~0u, time, step);
    int const other = __shfl_xor_sync(~0u, best, step);
    bool const better = other_time < time || (other_time == time && other < best);
    if (better) time = other_time, best = other;
  }
  return best;
}

template <class S>
struct Planner {
  AttentionParams const& params;
  Workspace workspace;
  int num_items;
  int parts;
  int longest;  // no item has more tiles

  struct Entry {
    alignas(16) WorkItem item;
    int length_class;  // 0: longest; kClasses: no entry
  };

  // Entry `index` of the unsorted list: item index / parts, part index % parts.
  __device__ Entry entry(int index) const {
    Entry result{};
    result.length_class = kClasses;
    if (index >= num_items * parts) return result;
    // Divisions by run-time numbers are long, and most lists have one part per item.
    int const item_index = parts == 1 ? index : index / parts, part = index - item_index * parts;
    int const user = user_of(item_index);
    UserShape const rows = workspace.rows ? workspace.rows[user] : user_shape(params, user);
    UserItems<S> const items(rows);
    ItemBlocks const blocks = item_blocks<S>(items, item_index - workspace.first_items[user]);
    TileRange const tiles = item_tiles<S>(params, rows, blocks);
    int const length = tiles.end - tiles.begin;
    int const item_parts = parts_of_item(parts, length);
    if (part >= item_parts) return result;
    result.item.user = user;
    result.item.rows = rows;
#pragma unroll
    for (int slot = 0; slot < kMaxSlots; ++slot) result.item.blocks[slot] = slot_block(blocks, slot);
    TileRange const part_tiles = tiles_of_part<1>(tiles, part, item_parts);
    result.item.tile_begin = part_tiles.begin;
    result.item.tile_end = part_tiles.end;
    result.item.part = part | item_parts << 16;
    result.item.group = item_index * parts;
    int const part_length = result.item.tile_end - result.item.tile_begin;
    // A user's items stand longest first already; what is short fills the gaps at the end.
    result.length_class = 4 * part_length > longest ? 0 : 16 * part_length > longest ? 1 : 2;
    return result;
  }

 private:
  __device__ int user_of(int item_index) const {
    int low = 0, high = params.users;
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (workspace.first_items[middle] <= item_index ? low : high) = middle;
    }
    return low;
  }
};

// Counts each user's items; returns the number of items and the length bound of the longest.
template <class S>
__device__ int2 count_items(AttentionParams const& params, Workspace const& workspace, UsersInShared& shared) {
  __shared__ int warp_sums[kWarps];
  __shared__ int longest;
  if (threadIdx.x == 0) longest = 0;
  __syncthreads();
  int total = 0;
  for (int base = 0; base < params.users; base += kThreads) {
    int const user = base + threadIdx.x;
    int items = 0;
    if (user < params.users) {
      UserShape const rows = user_shape(params, user);
      if (workspace.rows) shared.rows[user] = rows;
      items = UserItems<S>(rows).count();
      int const fresh = rows.prefix - rows.cached;
      atomicMax(&longest, ceil_div(rows.cached, S::kTileKeys) + ceil_div(fresh, S::kTileKeys) + S::kSelfTiles);
    }
    Scan const scan = block_scan(items, warp_sums);
    if (user < params.users) workspace.first_items[user] = total + scan.before;
    total += scan.total;
  }
  __syncthreads();
  return {total, longest};
}

// Stable counting sort by class of length: entries keep their order within a class. Rounds of a thread per entry
// count first and place then; a list of one round is looked at once. Each warp counts with ballots, and each thread
// adds up the warps before its own.
template <class S>
__device__ int sort_items(Planner<S> const& planner, WorkItem* sorted) {
  __shared__ int class_counts[kClasses];
  __shared__ int placed[kClasses];            // in earlier rounds
  __shared__ int in_warps[kClasses][kWarps];  // in this round
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int const entries = planner.num_items * planner.parts;
  int const rounds = ceil_div(entries, kThreads);
  if (threadIdx.x < kClasses) class_counts[threadIdx.x] = placed[threadIdx.x] = 0;
  __syncthreads();
  typename Planner<S>::Entry entry;
#pragma unroll 1
  for (int step = 0; step < 2 * rounds; ++step) {
    bool const placing = step >= rounds;
    if (!placing || rounds > 1) {
      entry = planner.entry((placing ? step - rounds : step) * kThreads + threadIdx.x);
    }
    unsigned same = 0;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      unsigned const lanes = __ballot_sync(~0u, entry.length_class == c);
      if (entry.length_class == c) same = lanes;
      if (lane == 0) in_warps[c][warp] = __popc(lanes);
    }
    __syncthreads();
    int const c = entry.length_class;
    if (placing && c < kClasses) {
      int at = placed[c] + __popc(same & ((1u << lane) - 1));
#pragma unroll
      for (int longer = 0; longer < kClasses; ++longer) at += longer < c ? class_counts[longer] : 0;
#pragma unroll
      for (int before = 0; before < kWarps; ++before) at += before < warp ? in_warps[c][before] : 0;
      copy_item(&entry.item, &sorted[at]);
    }
    __syncthreads();
    if (threadIdx.x < kClasses) {
      int* const sum = placing ? placed : class_counts;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum[threadIdx.x] += in_warps[threadIdx.x][w];
    }
    __syncthreads();
  }
  int total = 0;
  for (int count : class_counts) total += count;
  return total;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(__grid_constant__ AttentionParams const params, int const max_items, int const multiprocessors,
                bool const split, int32_t* const counters, int const num_counters) {
  __shared__ UsersInShared shared;
  allow_next_kernel();
  Workspace const workspace(params, max_items, shared);
  int2 const counted = count_items<S>(params, workspace, shared);
  int const parts = split ? choose_parts(counted.x, params.heads, multiprocessors) : 1;
  Planner<S> const planner{params, workspace, counted.x, parts, counted.y};
  int const total = sort_items(planner, workspace.items);
  if (threadIdx.x == 0) *workspace.header = PlanHeader{total, 0, 0, planner.longest <= kShortItem ? 4 : 2, {}};
  if (parts == 1) return;
  for (int i = threadIdx.x; i < num_counters; i += kThreads) counters[i] = 0;
}

}  // namespace

int plan_max_items(AttentionParams const& params, PlanShape shape) noexcept {
  // A user has at most one short group of each kind.
  int const rows_per_item = shape.slots * kBlockRows;
  int const items = params.query_rows / rows_per_item + 2 * params.users;
  return std::max(items, kMaxSplitWork);
}

size_t plan_size(AttentionParams const& params, PlanShape shape) noexcept {
  size_t const bytes = sizeof(PlanHeader) + sizeof(WorkItem) * plan_max_items(params, shape) +
                       sizeof(int32_t) * (static_cast<size_t>(params.users) + 1);
  return (bytes + 255) / 256 * 256;
}

cudaError_t launch_plan(AttentionParams const& params, PlanShape shape, int multiprocessors, int32_t* counters,
                        int num_counters, cudaStream_t stream) noexcept {
  auto launch = [&](auto kernel) {
    kernel<<<1, kThreads, 0, stream>>>(params, plan_max_items(params, shape), multiprocessors, shape.split, counters,
                                       num_counters);
    return cudaGetLastError();
  };
  switch (100000 * shape.slots + 100 * shape.tile_keys + shape.self_tiles) {
    case 212801: return launch(plan_kernel<Shape<2, 128, 1>>);
    case 208002: return launch(plan_kernel<Shape<2, 80, 2>>);
    case 206402: return launch(plan_kernel<Shape<2, 64, 2>>);
    case 206401: return launch(plan_kernel<Shape<2, 64, 1>>);
    case 203201: return launch(plan_kernel<Shape<2, 32, 1>>);
    case 309603: return launch(plan_kernel<Shape<3, 96, 3>>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace hstu_trt
