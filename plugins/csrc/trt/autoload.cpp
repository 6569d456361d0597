// SPDX-License-Identifier: Apache-2.0
// libhstu_trt_plugins_autoload.so: for hosts that only dlopen their plugins (Triton, Polygraphy, trtexec
// --staticPlugins). When it is loaded, it has TensorRT's registry load libhstu_trt_plugins.so, which lies beside it.
//
// It calls the registry, whose virtual table differs between major versions: one such library per major, and it does
// nothing but say so in the process of another.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "host_library.h"
#include "plugin.h"

namespace {

using hstu_trt::trt::HostLibrary;

constexpr char kPlugins[] = "libhstu_trt_plugins.so";

void say(char const* text) {
  std::fprintf(stderr, "[hstu.trt] %s for TensorRT %d: %s\n", kPlugins, NV_TENSORRT_MAJOR, text);
}

// TensorRT may be linked into the host, or loaded with local symbols, which only its own handle finds.
HostLibrary find_tensorrt() {
  HostLibrary const global{RTLD_DEFAULT};
  if (global.version()) return global;
  for (char const* name : {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so"}) {
    char file[64];
    std::snprintf(file, sizeof(file), "%s.%d", name, NV_TENSORRT_MAJOR);
    if (void* const handle = dlopen(file, RTLD_LAZY | RTLD_NOLOAD)) return {handle};
  }
  return {};
}

// Writes the path of kPlugins in the folder of this library.
bool find_plugins(char* path, size_t size) {
  Dl_info self{};
  if (!dladdr(reinterpret_cast<void const*>(&find_plugins), &self) || !self.dli_fname) return false;
  char const* const slash = std::strrchr(self.dli_fname, '/');
  int const folder = slash ? static_cast<int>(slash - self.dli_fname + 1) : 0;
  int const length = std::snprintf(path, size, "%.*s%s", folder, self.dli_fname, kPlugins);
  return length > 0 && static_cast<size_t>(length) < size;
}

__attribute__((constructor)) void load_plugins() {
  HostLibrary const tensorrt = find_tensorrt();
  if (!tensorrt.is_major(NV_TENSORRT_MAJOR)) {
    return say("not registered: this process has none of that major version, or not yet (load TensorRT first)");
  }
  nvinfer1::IPluginRegistry* const registry = tensorrt.registry();
  if (!registry) return say("not registered: TensorRT has no plugin registry");
  if (registry->getCreator("HstuAttention", hstu_trt::trt::kVersion, hstu_trt::trt::kNamespace)) return;
  char path[4096];
  if (!find_plugins(path, sizeof(path)) || !registry->loadLibrary(path)) say("not registered: it could not be loaded");
}

}  // namespace
