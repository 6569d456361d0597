// SPDX-License-Identifier: Apache-2.0
// Rows of tables as commands: HMGET and HSET of fields of a partition's hash.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "capi.h"
#include "command.h"

namespace hstu_trt::remote {

// One version of a table. Partition p of it is the hash "<prefix>:p}"; the field of a row is its number, little endian.
class Table {
 public:
  Table(std::string prefix, uint32_t partitions, uint32_t row_bytes);

  uint32_t partition_of(int64_t row) const {
    return static_cast<uint32_t>(splitmix64(static_cast<uint64_t>(row))) & (partitions() - 1);
  }
  uint32_t partitions() const { return static_cast<uint32_t>(keys_.size()); }
  std::string const& key(uint32_t partition) const { return keys_[partition]; }
  int slot(uint32_t partition) const { return slots_[partition]; }

  uint32_t const row_bytes;

 private:
  std::vector<std::string> keys_;
  std::vector<int> slots_;
};

// The distinct rows of a job in the order of their partitions.
class Grouping {
 public:
  struct Range {
    uint32_t partition;
    uint32_t begin;
    uint32_t end;
  };

  // Sorts the rows that are not negative; ranges hold at most `most` rows.
  void sort(HstuTrtRemoteJob const& job, uint32_t most);

  std::vector<Range> const& ranges() const { return ranges_; }
  // Place in the job of the i-th distinct row: where it stands first.
  uint32_t first(uint32_t i) const { return first_[i]; }
  size_t distinct() const { return first_.size(); }
  // Calls `copy(from, to)` for each place whose row stood earlier.
  template <typename Copy>
  void for_twins(Copy copy) const {
    for (auto const& [from, to] : twins_) copy(from, to);
  }

 private:
  void find_distinct(HstuTrtRemoteJob const& job);

  std::vector<uint32_t> slots_;
  std::vector<uint32_t> unsorted_;
  std::vector<uint32_t> first_;
  std::vector<uint32_t> starts_;
  std::vector<std::pair<uint32_t, uint32_t>> twins_;
  std::vector<Range> ranges_;
};

// HMGET of some rows of one partition, straight into the job's output.
class ReadRows : public Command {
 public:
  ReadRows(HstuTrtRemoteJob const& job, Grouping const& grouping, Grouping::Range range);

  void encode(std::string& out) const override;
  void restart() override {
    next_ = range_.begin;
    begun_ = false;
  }
  void take(Token const& token) override;
  void refused(std::string_view error) override;
  void unavailable() override { fill(HSTU_TRT_ROW_UNAVAILABLE); }

 private:
  void fill(uint8_t status);

  HstuTrtRemoteJob const& job_;
  Table const& table_;
  Grouping const& grouping_;
  Grouping::Range range_;
  uint32_t next_;
  bool begun_ = false;
};

// HSET of some rows of one partition.
class WriteRows : public Command {
 public:
  WriteRows(HstuTrtRemoteJob const& job, Grouping const& grouping, Grouping::Range range);

  void encode(std::string& out) const override;
  void take(Token const&) override { fill(HSTU_TRT_ROW_FOUND); }
  void refused(std::string_view) override { fill(HSTU_TRT_ROW_REFUSED); }
  void unavailable() override { fill(HSTU_TRT_ROW_UNAVAILABLE); }

 private:
  void fill(uint8_t status);

  HstuTrtRemoteJob const& job_;
  Table const& table_;
  Grouping const& grouping_;
  Grouping::Range range_;
};

}  // namespace hstu_trt::remote
