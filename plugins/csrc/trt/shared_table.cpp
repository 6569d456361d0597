// SPDX-License-Identifier: Apache-2.0
#include "shared_table.h"

#include <NvInferRuntime.h>

#include <cstdlib>
#include <stdexcept>

#include "check.h"
#include "live_tables.h"
#include "log.h"
#include "resources.h"

namespace hstu_trt::trt {
namespace {

double poll_seconds() {
  char const* const text = std::getenv(kPollVariable);
  if (!text || !*text) return 0.;
  char* end = nullptr;
  double const seconds = std::strtod(text, &end);
  if (*end != '\0' || !(seconds >= 0.) || seconds > 86400.) {
    throw std::runtime_error(std::string(kPollVariable) + "=" + text + " is no number of seconds");
  }
  return seconds;
}

// The resource of a folder on a device. TensorRT keeps a clone of the first caller's; only clones hold tables.
class TablesResource final : public nvinfer1::IPluginResource {
 public:
  explicit TablesResource(std::string root) : root_(std::move(root)) {}
  ~TablesResource() noexcept override = default;

  int32_t release() noexcept override {
    live_.reset();
    return 0;
  }

  nvinfer1::IPluginResource* clone() noexcept override {
    return guarded("EmbeddingLookup", root_.c_str(), static_cast<nvinfer1::IPluginResource*>(nullptr),
                   [this]() -> nvinfer1::IPluginResource* {
                     auto result = std::make_unique<TablesResource>(root_);
                     result->live_ = std::make_unique<LiveTables>(root_, poll_seconds());
                     return result.release();
                   });
  }

  LiveTables& live() const noexcept { return *live_; }

 private:
  std::string root_;
  std::unique_ptr<LiveTables> live_;
};

class AcquiredTable final : public SharedTable {
 public:
  AcquiredTable(std::string const& root, std::string const& name, std::string key) : key_(std::move(key)) {
    TablesResource prototype(root);
    auto* const resource = static_cast<TablesResource*>(acquire_resource(key_.c_str(), prototype));
    if (!resource) throw std::runtime_error("tables of " + root + " cannot be shared");
    live_ = &resource->live();
    try {
      place_ = live_->open(name);
    } catch (...) {
      release_resource(key_.c_str());
      throw;
    }
  }
  ~AcquiredTable() override { release_resource(key_.c_str()); }
  AcquiredTable(AcquiredTable const&) = delete;
  AcquiredTable& operator=(AcquiredTable const&) = delete;

  EmbeddingTable const* const* live_tables() const noexcept override { return live_->word(); }
  int32_t place() const noexcept override { return place_.number; }
  bool changes() const noexcept override { return live_->changes(); }
  int32_t dim() const noexcept override { return place_.dim; }
  DataType type() const noexcept override { return place_.type; }

 private:
  std::string key_;
  LiveTables* live_;
  LiveTables::Place place_;
};

}  // namespace

std::shared_ptr<SharedTable const> acquire_table(std::string const& name) {
  std::string const what = "table '" + name + "'";
  std::string const root = tables_root(what);
  int device = 0;
  check(cudaGetDevice(&device), what);
  std::string key = "hstu.trt/tables/" + root + "/cuda:" + std::to_string(device);
  // Versions that stay: contexts made after a change have tables of their own.
  std::string const version = find_stored_table(root, name).version;
  if (poll_seconds() == 0.) key += "@" + version;
  return std::make_shared<AcquiredTable>(root, name, key);
}

}  // namespace hstu_trt::trt
