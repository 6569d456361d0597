// SPDX-License-Identifier: Apache-2.0
// One version of a table in memory: its first rows, its scales and permutation on the GPU, the other rows pinned.
#pragma once

#include "../kernels/embedding/params.h"
#include "stored_table.h"

namespace hstu_trt::trt {

class DeviceTable {
 public:
  // Loads the table to the current device and waits for it. Throws std::runtime_error.
  DeviceTable(StoredTable const& stored, int64_t hot_rows);
  ~DeviceTable();
  DeviceTable(DeviceTable const&) = delete;
  DeviceTable& operator=(DeviceTable const&) = delete;

  EmbeddingTable const& table() const noexcept { return table_; }
  std::string const& version() const noexcept { return version_; }

 private:
  void load(StoredTable const& stored);
  void load_rows(StoredTable const& stored, StoredShard const& shard);
  void allocate_cold(size_t bytes, std::string const& what);
  void free() noexcept;

  EmbeddingTable table_{};
  std::string version_;
  void* device_ = nullptr;
  void* host_ = nullptr;
  size_t host_bytes_ = 0, pinned_bytes_ = 0;
};

}  // namespace hstu_trt::trt
