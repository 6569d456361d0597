// SPDX-License-Identifier: Apache-2.0
#include "gather.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "thread_pool.h"

namespace hstu_trt {
namespace {

constexpr int64_t kPartRows = 128;
constexpr int64_t kCacheLine = 64;
// Rows are fetched this far ahead, four to eight of the usual widths.
constexpr int64_t kBytesAhead = 8192;
// Less output than this is done by the caller before another thread has woken up.
constexpr int64_t kBytesPerThread = 64 << 10;

struct Source {
  char const* row;  // nullptr: a row of zeros
  float const* scale;
};

// Into the second-level cache: the first one has too few outstanding misses for whole rows (a fifth slower).
void prefetch(Source const& source, int64_t row_bytes) {
  if (source.row == nullptr) return;
  for (int64_t at = 0; at < row_bytes; at += kCacheLine) __builtin_prefetch(source.row + at, 0, 2);
  if (source.scale != nullptr) __builtin_prefetch(source.scale, 0, 2);
}

uint64_t first_slot(int64_t row, uint64_t mask) { return splitmix64(row, 0) & mask; }

class Gather {
 public:
  Gather(GatherParams const& params, ConvertRow convert)
      : params_(params), convert_(convert), row_bytes_(params.dim * item_bytes(params.type)) {
    ahead_ = std::clamp<int64_t>(kBytesAhead / std::max<int64_t>(row_bytes_, 1), 4, 16);
  }

  static void run_part(void* self, int64_t part) { static_cast<Gather*>(self)->fill(part); }

  GatherResult result() const {
    int64_t const rejected = rejected_.load();
    return {bad_.load(), rejected == kNone ? -1 : rejected};
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;

  void fill(int64_t part) {
    int64_t const first = part * kPartRows, count = std::min(kPartRows, params_.count - first);
    Source sources[kPartRows];
    if (!resolve(first, count, sources)) return;
    for (int64_t i = 0; i < std::min(ahead_, count); ++i) prefetch(sources[i], row_bytes_);
    char* out = static_cast<char*>(params_.out) + first * params_.out_stride;
    for (int64_t i = 0; i < count; ++i, out += params_.out_stride) {
      if (i + ahead_ < count) prefetch(sources[i + ahead_], row_bytes_);
      Source const& source = sources[i];
      if (source.row == nullptr) {
        std::memset(out, 0, params_.dim * item_bytes(params_.out_type));
      } else {
        convert_(source.row, source.scale == nullptr ? 1.0f : *source.scale, out, params_.dim);
      }
    }
  }

  // Finds the row of each id; false if one is rejected.
  bool resolve(int64_t first, int64_t count, Source* sources) {
    int64_t rows[kPartRows];
    if (!find_rows(first, count, rows)) return false;
    OverlayRows const* overlay = params_.overlay;
    if (overlay != nullptr) {
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(overlay->slots + first_slot(rows[i], overlay->mask), 0, 2);
    }
    for (int64_t i = 0; i < count; ++i) {
      sources[i] = rows[i] < 0 ? Source{nullptr, nullptr} : overlay == nullptr ? source_of(rows[i]) : overlaid(rows[i]);
    }
    return true;
  }

  bool find_rows(int64_t first, int64_t count, int64_t* rows) {
    int64_t bad = 0;
    bool kept = true;
    for (int64_t i = 0; i < count; ++i) {
      ResolvedId const found = resolve_id(params_.rule, id_at(first + i), RowStatus::kHost);
      bad += found.status == RowStatus::kBadId;
      if (found.row == kRejected && kept) {
        reject(first + i);
        kept = false;
      }
      params_.status[(first + i) * params_.status_stride] = static_cast<uint8_t>(found.status);
      rows[i] = found.row;
    }
    if (bad != 0) bad_.fetch_add(bad, std::memory_order_relaxed);
    return kept;
  }

  int64_t id_at(int64_t place) const {
    char const* at = static_cast<char const*>(params_.ids) + place * params_.id_stride;
    if (params_.ids_are_32_bit) {
      int32_t id;
      std::memcpy(&id, at, sizeof(id));
      return id;
    }
    int64_t id;
    std::memcpy(&id, at, sizeof(id));
    return id;
  }

  Source overlaid(int64_t row) const {
    OverlayRows const& overlay = *params_.overlay;
    for (uint64_t at = first_slot(row, overlay.mask);; at = (at + 1) & overlay.mask) {
      uint32_t const place = overlay.slots[at];
      if (place == kEmptySlot) return source_of(row);
      if (overlay.numbers[place] != row) continue;
      return {static_cast<char const*>(overlay.values) + place * row_bytes_,
              overlay.scales == nullptr ? nullptr : overlay.scales + place};
    }
  }

  Source source_of(int64_t row) const {
    ShardRows const* shard = params_.shards;
    if (params_.shard_count > 1) {
      ShardRows const* end = params_.shards + params_.shard_count;
      shard = std::upper_bound(shard, end, row, [](int64_t r, ShardRows const& s) { return r < s.first_row; }) - 1;
    }
    int64_t const within = row - shard->first_row;
    return {static_cast<char const*>(shard->values) + within * row_bytes_,
            shard->scales == nullptr ? nullptr : shard->scales + within};
  }

  void reject(int64_t place) {
    int64_t known = rejected_.load(std::memory_order_relaxed);
    while (place < known && !rejected_.compare_exchange_weak(known, place, std::memory_order_relaxed)) {
    }
  }

  GatherParams const& params_;
  ConvertRow convert_;
  int64_t row_bytes_;
  int64_t ahead_;
  std::atomic<int64_t> bad_{0};
  std::atomic<int64_t> rejected_{kNone};
};

}  // namespace

void index_rows(int64_t const* numbers, int64_t count, uint32_t* slots, int64_t capacity) {
  std::fill_n(slots, capacity, kEmptySlot);
  uint64_t const mask = static_cast<uint64_t>(capacity) - 1;
  for (int64_t place = 0; place < count; ++place) {
    uint64_t at = first_slot(numbers[place], mask);
    while (slots[at] != kEmptySlot) at = (at + 1) & mask;
    slots[at] = static_cast<uint32_t>(place);
  }
}

bool gather(GatherParams const& params, GatherResult* result) {
  ConvertRow const convert = find_convert_row(params.type, params.out_type, params.portable != 0);
  if (convert == nullptr) return false;
  Gather job(params, convert);
  int64_t const parts = (params.count + kPartRows - 1) / kPartRows;
  int64_t const out_bytes = params.count * params.dim * item_bytes(params.out_type);
  int64_t const useful = 1 + out_bytes / kBytesPerThread;
  int const threads = static_cast<int>(std::min<int64_t>(params.threads, useful));
  ThreadPool::of_process().run(threads, parts, Gather::run_part, &job);
  *result = job.result();
  return true;
}

}  // namespace hstu_trt
