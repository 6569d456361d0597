// SPDX-License-Identifier: Apache-2.0
// From ids to rows: hashing, policies and a status per row, for the host and for CUDA. tables/ids.py says the same in
// numpy, and tests/support/id_vectors.json holds the vectors that both must reproduce.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HSTU_TRT_HOST_DEVICE __host__ __device__
#else
#define HSTU_TRT_HOST_DEVICE
#endif

namespace hstu_trt {

enum class IdHash : int32_t { kNone = 0, kSplitmix64 = 1, kPermutation = 2 };

enum class IdPolicy : int32_t { kReject = 0, kZero = 1, kClamp = 2, kRow0 = 3, kDefaultRow = 4 };

enum class RowStatus : uint8_t {
  kGpu = 0,
  kHost = 1,
  kRemote = 2,
  kMissing = 3,
  kBadId = 4,
  kUnavailable = 5,
  kPadding = 6,
};

constexpr int64_t kZeroRow = -1;  // stands for a row of zeros
constexpr int64_t kRejected = -2;

struct IdRule {
  int64_t rows;               // of the table
  uint64_t seed;              // of splitmix64
  uint32_t const* row_of_id;  // [id_count] of a permutation
  int64_t id_count;
  int64_t default_row;  // kZeroRow: a row of zeros
  int64_t padding_id;   // counts if has_padding
  IdHash hash;
  IdPolicy policy;
  int32_t has_padding;
  int32_t reserved;
};

struct ResolvedId {
  int64_t row;  // within the table, kZeroRow or kRejected
  RowStatus status;
};

// The generator of Steele, Lea and Flood (OOPSLA 2014), with the id as its state.
HSTU_TRT_HOST_DEVICE inline uint64_t splitmix64(int64_t id, uint64_t seed) {
  uint64_t z = (static_cast<uint64_t>(id) ^ seed) + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The high half of the 128-bit product: a hash becomes a row without a division (Lemire, TOMACS 2019).
HSTU_TRT_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// The row of an id, or kZeroRow for a bad one. No id reads outside of row_of_id, nor leads outside of the table.
HSTU_TRT_HOST_DEVICE inline int64_t hashed_row(IdRule const& rule, int64_t id) {
  if (rule.hash == IdHash::kSplitmix64) {
    return rule.rows > 0 ? static_cast<int64_t>(multiply_high(splitmix64(id, rule.seed), rule.rows)) : kZeroRow;
  }
  int64_t row = id;
  if (rule.hash == IdHash::kPermutation) {
    if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(rule.id_count)) return kZeroRow;
    row = rule.row_of_id[id];
  }
  return static_cast<uint64_t>(row) < static_cast<uint64_t>(rule.rows) ? row : kZeroRow;
}

HSTU_TRT_HOST_DEVICE inline int64_t policy_row(IdRule const& rule, int64_t id) {
  bool const empty = rule.rows <= 0;
  switch (rule.policy) {
    case IdPolicy::kZero: return kZeroRow;
    case IdPolicy::kDefaultRow: return rule.default_row < rule.rows ? rule.default_row : kZeroRow;
    case IdPolicy::kRow0: return empty ? kRejected : 0;
    case IdPolicy::kClamp: {
      if (empty) return kRejected;
      int64_t const last = (rule.hash == IdHash::kPermutation ? rule.id_count : rule.rows) - 1;
      int64_t const row = hashed_row(rule, id < 0 ? 0 : id > last ? last : id);
      return row == kZeroRow ? rule.rows - 1 : row;
    }
    default: return kRejected;
  }
}

// tier: the status of a row that is there.
HSTU_TRT_HOST_DEVICE inline ResolvedId resolve_id(IdRule const& rule, int64_t id, RowStatus tier) {
  if (rule.has_padding && id == rule.padding_id) return {kZeroRow, RowStatus::kPadding};
  int64_t const row = hashed_row(rule, id);
  if (row != kZeroRow) return {row, tier};
  return {policy_row(rule, id), RowStatus::kBadId};
}

}  // namespace hstu_trt
