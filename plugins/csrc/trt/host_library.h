// SPDX-License-Identifier: Apache-2.0
// A TensorRT library that is already in this process, opened without loading anything. Shared by the plugin library
// and the autoload library, neither of which is linked to TensorRT.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

namespace hstu_trt::trt {

struct HostLibrary {
  void* handle = nullptr;  // of dlopen, or RTLD_DEFAULT

  // E.g. 101501 for 10.15.1; 0 if this is no TensorRT library.
  int32_t version() const noexcept {
    auto const function = reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion"));
    return function ? function() : 0;
  }

  bool is_major(int32_t major) const noexcept { return version() / 10000 == major; }

  nvinfer1::IPluginRegistry* registry() const noexcept {
    auto const function = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(dlsym(handle, "getPluginRegistry"));
    return function ? function() : nullptr;
  }
};

// The library at `path` if it is loaded. The executable itself has no handle by its path: its symbols are global.
inline HostLibrary open_loaded(char const* path) noexcept {
  void* const handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  return {handle ? handle : RTLD_DEFAULT};
}

}  // namespace hstu_trt::trt
