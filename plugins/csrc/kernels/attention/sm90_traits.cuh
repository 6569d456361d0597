// SPDX-License-Identifier: Apache-2.0
// Tile sizes, shared memory and tensor maps of the Hopper kernel, per element type and head width.
#pragma once

#include "../common/wgmma.cuh"
#include "mask.cuh"
#include "plan.h"
#include "value_blocks.h"

namespace hstu_trt::sm90 {

constexpr int kProducerThreads = 128;
constexpr int kPanelBytes = 128;  // widest row that the copy engine swizzles

// Items whose parts are added up through memory need nothing to hand over sums.
struct NoExchange {};

template <class Element_, int kDim_, int kTileKeys_, int kConsumers_, int kStages_, int kValueStages_, int kQuerySlots_,
          int kOperands_, bool kTurns_>
struct Traits {
  using Element = Element_;
  static constexpr int kDim = kDim_;                  // of q, k and v
  static constexpr int kTileKeys = kTileKeys_;        // keys per tile
  static constexpr int kConsumers = kConsumers_;      // warpgroups that compute, one 64-row block each
  static constexpr int kStages = kStages_;            // tiles of K in flight
  static constexpr int kValueStages = kValueStages_;  // tiles of V in flight
  static constexpr int kQuerySlots = kQuerySlots_;    // items in flight
  static constexpr int kOperands = kOperands_;        // tiles of SiLU(S) in registers, 1 or 2
  static constexpr bool kTurns = kTurns_;             // warpgroups take turns in starting products
  static constexpr bool kQueriesInRegisters = kDim == 128 || (kDim == 64 && sizeof(Element) == 2);

  static constexpr bool kFp8 = sizeof(Element) == 1;
  static constexpr int kThreads = kProducerThreads + 128 * kConsumers;
  // The registers that the CTA starts with, shared out anew: the producer needs few.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 56 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : 232;

  // Candidates' own keys: 64 rows per block, as many blocks per tile as fit.
  static constexpr int kSelfBlocks = kTileKeys / kBlockRows;
  static constexpr int kSelfTiles = (kConsumers + kSelfBlocks - 1) / kSelfBlocks;

  // Q and K: panels of 128-byte rows (or one of 64-byte rows), [panel][row][128 bytes].
  static constexpr int kRowBytes = kDim * sizeof(Element) < kPanelBytes ? kDim * sizeof(Element) : kPanelBytes;
  static constexpr int kPanels = kDim * sizeof(Element) / kRowBytes;
  static constexpr int kPanelElements = kRowBytes / sizeof(Element);
  static constexpr Swizzle kRowSwizzle = kRowBytes == 128 ? Swizzle::k128 : Swizzle::k64;

  static constexpr int kQueryBlockBytes = kBlockRows * kDim * sizeof(Element);
  static constexpr int kQueryBytes = kConsumers * kQueryBlockBytes;
  static constexpr int kKeyBytes = kTileKeys * kDim * sizeof(Element);
  // V: as K; fp8: the keys of a tile out of a value block, [kDim][kTileKeys].
  static constexpr int kValueBytes = kKeyBytes;
  // Half-precision output goes through the memory of the block's queries; fp8 ones have room for half of it.
  static constexpr int kOutputPasses = kFp8 ? 2 : 1;
  static constexpr int kOutputColumns = kDim / kOutputPasses;

  static constexpr int kValueRowBytes = kFp8 ? kTileKeys : kPanelBytes;
  static constexpr Swizzle kValueSwizzle = kValueRowBytes == 128 ? Swizzle::k128 : Swizzle::k64;

  static constexpr int kKeyBoxRows = kTileKeys % kBlockRows == 0 ? kBlockRows : kTileKeys;
  static constexpr int kPagedBoxRows = kTileKeys % kBlockRows == 0 ? kBlockRows : 16;

  static constexpr int kClusterParts = 1;  // most parts of an item that a cluster shares
  using Exchange = NoExchange;

  static constexpr PlanShape plan_shape() { return {kConsumers, kTileKeys, kSelfTiles, true}; }

  static_assert(!kFp8 || kValueBlockKeys % kTileKeys == 0, "tiles of fp8 values do not straddle value blocks");
  static_assert(!kFp8 || kConsumers == 2, "a value block holds the candidates of two row blocks");
};

// fp16, bf16, by head width.
template <class Element, int kDim>
struct TraitsFor;
template <class Element>
struct TraitsFor<Element, 64> {
  using Type = Traits<Element, 64, 96, 3, 4, 4, 2, 1, false>;
};
template <class Element>
struct TraitsFor<Element, 128> {
  using Type = Traits<Element, 128, 128, 2, 2, 3, 2, 1, true>;
};
template <class Element>
struct TraitsFor<Element, 256> {
  using Type = Traits<Element, 256, 80, 2, 2, 2, 1, 1, true>;
};
template <>
struct TraitsFor<__nv_fp8_e4m3, 64> {
  using Type = Traits<__nv_fp8_e4m3, 64, 128, 2, 4, 4, 2, 2, false>;
};
template <>
struct TraitsFor<__nv_fp8_e4m3, 128> {
  using Type = Traits<__nv_fp8_e4m3, 128, 128, 2, 4, 4, 2, 2, false>;
};
template <>
struct TraitsFor<__nv_fp8_e4m3, 256> {
  using Type = Traits<__nv_fp8_e4m3, 256, 64, 2, 4, 4, 1, 1, false>;
};

constexpr int kItemSlots = 4;

// What the scheduler hands to the loader and the consumers.
struct ItemSlot {
  WorkItem item;
  int head;       // negative: no more items
  int last_part;  // of a split item: whether all its other parts have come as far
};

template <class T>
struct SharedMemory {
  alignas(1024) unsigned char queries[T::kQuerySlots][T::kQueryBytes];
  alignas(1024) unsigned char keys[T::kStages][T::kKeyBytes];
  alignas(1024) unsigned char values[T::kValueStages][T::kValueBytes];
  ItemSlot items[kItemSlots];
  uint64_t item_full[kItemSlots], item_empty[kItemSlots];
  uint64_t query_full[T::kQuerySlots], query_empty[T::kQuerySlots];
  uint64_t key_full[T::kStages], key_empty[T::kStages];
  uint64_t value_full[T::kValueStages], value_empty[T::kValueStages];
  typename T::Exchange exchange;
};

struct TensorMaps {
  CUtensorMap query, key, value, cached_key, cached_value;
};

// Of a split item and head: parts that have begun their last tile, and parts of each block whose sums are written.
// Zero between launches.
struct SplitCounters {
  int32_t arrived, written[kMaxSlots];
};

// Behind the plan in the workspace.
struct SplitWorkspace {
  float* sums;              // of split items' fragments: [list entry][head][warpgroup][kDim / 2][128 threads]
  SplitCounters* counters;  // [list entry][head]
};

// Where a position along the stages of a pipeline stands.
template <int kStages>
struct Pipeline {
  uint32_t count = 0;
  __device__ int stage(uint32_t ahead = 0) const { return (count + ahead) % kStages; }
  __device__ uint32_t parity(uint32_t ahead = 0) const { return (count + ahead) / kStages & 1; }
};

}  // namespace hstu_trt::sm90
