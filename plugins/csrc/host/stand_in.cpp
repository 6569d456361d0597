// SPDX-License-Identifier: Apache-2.0
#include "stand_in.h"

#include <NvInferRuntime.h>

#include <map>
#include <mutex>

namespace {

using nvinfer1::AsciiChar;
using nvinfer1::IPluginResource;

std::mutex g_mutex;  // of the log
std::string g_log, g_taken;
int g_clones = 0;

class Logger final : public nvinfer1::ILogger {
  void log(Severity severity, AsciiChar const* text) noexcept override {
    std::lock_guard const lock(g_mutex);
    constexpr char const* kNames[] = {"internal error", "error", "warning", "info", "verbose"};
    g_log += std::string(kNames[static_cast<int>(severity)]) + ": " + text + "\n";
  }
};

class Finder final : public nvinfer1::ILoggerFinder {
 public:
  nvinfer1::ILogger* findLogger() override {
    static Logger logger;
    return &logger;
  }
};

// Resources alone; it knows no creators.
class Registry final : public nvinfer1::IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(nvinfer1::IPluginCreator&, AsciiChar const*) noexcept override { return false; }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* count) const noexcept override {
    *count = 0;
    return nullptr;
  }
  nvinfer1::IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(nvinfer1::IPluginCreator const&) noexcept override { return false; }
#endif
  void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(nvinfer1::IPluginCreatorInterface&, AsciiChar const*) noexcept override { return false; }
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = 0;
    return nullptr;
  }
  nvinfer1::IPluginCreatorInterface* getCreator(AsciiChar const*, AsciiChar const*,
                                                AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(nvinfer1::IPluginCreatorInterface const&) noexcept override { return false; }
  nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override {
    return getAllCreators(count);
  }

  IPluginResource* acquirePluginResource(AsciiChar const* key, IPluginResource* resource) noexcept override {
    std::lock_guard const lock(mutex_);
    auto [entry, is_new] = entries_.try_emplace(key);
    if (is_new) {
      entry->second.resource = resource->clone();
      ++g_clones;
    }
    if (!entry->second.resource) {
      entries_.erase(entry);
      return nullptr;
    }
    ++entry->second.users;
    return entry->second.resource;
  }

  int32_t releasePluginResource(AsciiChar const* key) noexcept override {
    std::lock_guard const lock(mutex_);
    auto const entry = entries_.find(key);
    if (entry == entries_.end()) return -1;
    if (--entry->second.users > 0) return 0;
    entry->second.resource->release();
    delete entry->second.resource;
    entries_.erase(entry);
    return 0;
  }

  int size() const { return static_cast<int>(entries_.size()); }

 private:
  struct Entry {
    IPluginResource* resource = nullptr;
    int users = 0;
  };
  std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

Registry& registry() {
  static auto* const one = new Registry;
  return *one;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
__attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept { return &registry(); }

char const* hstu_trt_stand_in_take_log() {
  std::lock_guard const lock(g_mutex);
  g_taken.swap(g_log);
  g_log.clear();
  return g_taken.c_str();
}
int hstu_trt_stand_in_resources() { return registry().size(); }
int hstu_trt_stand_in_clones() { return g_clones; }
void* hstu_trt_stand_in_finder() {
  static Finder finder;
  return static_cast<nvinfer1::ILoggerFinder*>(&finder);
}

}  // extern "C"
