// SPDX-License-Identifier: Apache-2.0
// One version of a table in memory: its first rows, its scales and permutation on the GPU, the other rows pinned.
#pragma once

#include "../kernels/embedding/params.h"
#include "stored_table.h"

namespace hstu_trt::trt {

// Which rows of which table are in GPU memory: "item_id=1000000,user_id=0". Tables that are not named are there whole.
// A deployment decides that, not a plan: it depends on the GPU.
constexpr char kHotRowsVariable[] = "HSTU_TRT_TABLES_HOT_ROWS";

// Rows of the table that the variable leaves in GPU memory. Throws std::runtime_error for text that is no such list.
int64_t wanted_hot_rows(std::string const& name, int64_t rows);

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
