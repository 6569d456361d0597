// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"

#include <dlfcn.h>

#include <atomic>

#include "host_library.h"

namespace hstu_trt::trt {
namespace {

// Which TensorRT loaded us, found out once.
struct Runtime {
  nvinfer1::ILoggerFinder* finder = nullptr;
  nvinfer1::IPluginRegistry* registry = nullptr;
};

std::atomic<Runtime*> g_runtime{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  static Runtime runtime;
  if (!finder) return;
  // An object of a class with virtual functions begins with the address of its table, which lies in its library.
  Dl_info code{};
  void const* const table = *reinterpret_cast<void const* const*>(finder);
  if (!dladdr(table, &code) || !code.dli_fname) return;
  HostLibrary const library = open_loaded(code.dli_fname);
  if (!library.is_major(NV_TENSORRT_MAJOR)) return;
  runtime = {finder, library.registry()};
  g_runtime.store(&runtime, std::memory_order_release);
}

nvinfer1::ILogger* find_logger() noexcept {
  Runtime const* const runtime = g_runtime.load(std::memory_order_acquire);
  return runtime ? runtime->finder->findLogger() : nullptr;
}

nvinfer1::IPluginRegistry* find_registry() noexcept {
  Runtime const* const runtime = g_runtime.load(std::memory_order_acquire);
  return runtime ? runtime->registry : nullptr;
}

}  // namespace hstu_trt::trt
