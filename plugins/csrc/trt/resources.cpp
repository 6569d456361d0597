// SPDX-License-Identifier: Apache-2.0
#include "resources.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "log.h"
#include "runtime.h"

namespace hstu_trt::trt {
namespace {

using nvinfer1::IPluginResource;

class OwnResources {
 public:
  IPluginResource* acquire(std::string const& key, IPluginResource& prototype) {
    std::lock_guard const lock(mutex_);
    Entry& entry = entries_[key];
    if (!entry.resource) entry.resource.reset(prototype.clone());
    if (!entry.resource) {
      entries_.erase(key);
      return nullptr;
    }
    ++entry.users;
    return entry.resource.get();
  }

  void release(std::string const& key) {
    std::lock_guard const lock(mutex_);
    auto const found = entries_.find(key);
    if (found == entries_.end() || --found->second.users > 0) return;
    found->second.resource->release();
    entries_.erase(found);
  }

 private:
  struct Entry {
    std::unique_ptr<IPluginResource> resource;
    int users = 0;
  };

  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

// Never destroyed: engines may outlive the library's static objects.
OwnResources& own_resources() {
  static auto* const resources = new OwnResources;
  return *resources;
}

}  // namespace

IPluginResource* acquire_resource(char const* key, IPluginResource& prototype) noexcept {
  if (nvinfer1::IPluginRegistry* const registry = find_registry()) {
    return registry->acquirePluginResource(key, &prototype);
  }
  return guarded("resources", "acquire", static_cast<IPluginResource*>(nullptr),
                 [&] { return own_resources().acquire(key, prototype); });
}

void release_resource(char const* key) noexcept {
  if (nvinfer1::IPluginRegistry* const registry = find_registry()) {
    registry->releasePluginResource(key);
    return;
  }
  guarded("resources", "release", 0, [&] {
    own_resources().release(key);
    return 0;
  });
}

}  // namespace hstu_trt::trt
