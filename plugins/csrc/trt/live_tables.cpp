// SPDX-License-Identifier: Apache-2.0
#include "live_tables.h"

#include <algorithm>
#include <chrono>

#include "../kernels/embedding/embedding.h"
#include "check.h"
#include "hot_rows.h"
#include "log.h"

namespace hstu_trt::trt {
namespace {

// Other threads may be capturing a graph: what this thread does is no part of it.
class OutsideOfCaptures {
 public:
  OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(OutsideOfCaptures const&) = delete;
  OutsideOfCaptures& operator=(OutsideOfCaptures const&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

std::shared_ptr<DeviceTable> load(StoredTable const& stored) {
  return std::make_shared<DeviceTable>(stored, wanted_hot_rows(stored.name, stored.rows));
}

}  // namespace

LiveTables::Generation::~Generation() {
  cudaFree(structs);
  cudaGetLastError();
}

LiveTables::LiveTables(std::string root, double poll_seconds) : root_(std::move(root)), poll_seconds_(poll_seconds) {
  OutsideOfCaptures const outside;
  check(cudaGetDevice(&device_), root_);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), root_);
  check(cudaMalloc(&word_, sizeof(void*)), root_);
  if (changes()) watcher_ = std::thread([this] { watch(); });
}

LiveTables::~LiveTables() {
  {
    std::lock_guard const lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (watcher_.joinable()) watcher_.join();
  OutsideOfCaptures const outside;
  cudaDeviceSynchronize();
  cudaFree(word_);
  if (stream_) cudaStreamDestroy(stream_);
  cudaGetLastError();
}

LiveTables::Place LiveTables::open(std::string const& name) {
  std::lock_guard const lock(mutex_);
  OutsideOfCaptures const outside;
  for (size_t i = 0; i < names_.size(); ++i) {
    if (names_[i] == name) return places_[i];
  }
  StoredTable stored = find_stored_table(root_, name);
  if (current_ && stored.version != current_->version && changes()) {
    refresh();
    stored = find_stored_table(root_, name);
  }
  // What the word points at is of one version, and what is loaded is as wide as the place says.
  if (current_ && stored.version != current_->version) {
    throw std::runtime_error("table '" + name + "' in " + root_ + ": the version changes just now; try again");
  }
  auto next = std::make_shared<Generation>();
  if (current_) next->tables = current_->tables;
  next->tables.push_back(load(stored));
  next->version = next->tables.back()->version();
  Place const place{static_cast<int32_t>(names_.size()), stored.dim, stored.type};
  publish(next);
  names_.push_back(name);
  places_.push_back(place);
  return place;
}

// Makes `next` what the word points at; the one before stays until nobody can be reading it.
void LiveTables::publish(std::shared_ptr<Generation> next) {
  std::vector<EmbeddingTable> structs;
  for (auto const& table : next->tables) structs.push_back(table->table());
  size_t const bytes = structs.size() * sizeof(EmbeddingTable);
  check(cudaMalloc(&next->structs, bytes), root_);
  check(cudaMemcpyAsync(next->structs, structs.data(), bytes, cudaMemcpyHostToDevice, stream_), root_);
  check(cudaStreamSynchronize(stream_), root_);
  check(launch_embedding_publish(static_cast<EmbeddingTable const**>(word_),
                                 static_cast<EmbeddingTable const*>(next->structs), stream_),
        root_);
  check(cudaStreamSynchronize(stream_), root_);
  if (current_) retired_.push_back(current_);
  current_ = std::move(next);
}

void LiveTables::watch() noexcept {
  cudaSetDevice(device_);
  OutsideOfCaptures const outside;
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, std::chrono::duration<double>(poll_seconds_), [this] { return stop_; })) {
    guarded("EmbeddingLookup", "refresh", 0, [this] {
      free_unused();
      if (current_ && current_version(root_) != current_->version) refresh();
      return 0;
    });
  }
}

// Loads all tables of the version in use now. One that does not fit what is being served is refused: rows stay as
// they are.
void LiveTables::refresh() {
  std::string const version = current_version(root_);
  for (size_t i = 0; i < retired_.size(); ++i) {
    if (retired_[i]->version != version || retired_[i]->tables.size() != names_.size()) continue;
    std::shared_ptr<Generation> const back = retired_[i];
    auto next = std::make_shared<Generation>();
    next->version = version;
    next->tables = back->tables;
    publish(next);
    log_info("EmbeddingLookup: tables of %s: back to version %s", root_.c_str(), version.c_str());
    return;
  }
  auto next = std::make_shared<Generation>();
  next->version = version;
  for (size_t i = 0; i < names_.size(); ++i) {
    StoredTable const stored = find_stored_table(root_, names_[i]);
    if (stored.dim != places_[i].dim || stored.type != places_[i].type) {
      throw std::runtime_error("table '" + names_[i] + "' has another width or type in version " + version);
    }
    if (stored.version != version) throw std::runtime_error("the version changed while it was loaded");
    next->tables.push_back(load(stored));
  }
  publish(next);
  log_info("EmbeddingLookup: tables of %s: version %s is in use", root_.c_str(), version.c_str());
}

// Launches that were enqueued before the last exchange may read what is retired; later ones do not.
void LiveTables::free_unused() {
  if (retired_.empty()) return;
  cudaError_t const error = cudaDeviceSynchronize();
  cudaGetLastError();
  if (error == cudaSuccess) retired_.clear();
}

}  // namespace hstu_trt::trt
