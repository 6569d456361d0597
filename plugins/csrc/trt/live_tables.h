// SPDX-License-Identifier: Apache-2.0
// The tables in use of one folder on one device, behind one word of device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device_table.h"

namespace hstu_trt::trt {

class LiveTables {
 public:
  // poll_seconds: 0 for versions that stay. Throws std::runtime_error.
  LiveTables(std::string root, double poll_seconds);
  // Waits for the device: nobody may look up any more.
  ~LiveTables();
  LiveTables(LiveTables const&) = delete;
  LiveTables& operator=(LiveTables const&) = delete;

  struct Place {
    int32_t number;
    int32_t dim;
    DataType type;
  };

  // Loads the table unless it is there. Throws std::runtime_error.
  Place open(std::string const& name);

  EmbeddingTable const* const* word() const noexcept { return static_cast<EmbeddingTable const* const*>(word_); }
  bool changes() const noexcept { return poll_seconds_ > 0; }

 private:
  // What the word points at, and what that points at.
  struct Generation {
    ~Generation();
    std::string version;
    std::vector<std::shared_ptr<DeviceTable>> tables;
    void* structs = nullptr;
  };

  void publish(std::shared_ptr<Generation> next);
  void watch() noexcept;
  void refresh();
  void free_unused();

  std::string root_;
  double poll_seconds_;
  int device_ = 0;
  void* word_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::mutex mutex_;
  std::vector<std::string> names_;
  std::vector<Place> places_;
  std::shared_ptr<Generation> current_;
  std::deque<std::shared_ptr<Generation>> retired_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread watcher_;
};

}  // namespace hstu_trt::trt
