// SPDX-License-Identifier: Apache-2.0
#include "creators.h"

#include <dlfcn.h>

#include "checks.h"
#include "stand_in.h"

namespace hstu_trt::host {

using nvinfer1::AsciiChar;
using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;

// IPluginRegistry by its virtual table, up to what the host calls. The host is built with one set of headers and loads
// both majors: 11 has dropped the functions about IPluginCreator, which moved the others.
// Not in an anonymous namespace: the compiler would see that nothing implements them.
class Registry10 {
 public:
  virtual void register_v2_creator() = 0;
  virtual void v2_creators() = 0;
  virtual void v2_creator() = 0;
  virtual ~Registry10() = default;
  virtual void set_error_recorder() = 0;
  virtual void error_recorder() = 0;
  virtual void deregister_v2_creator() = 0;
  virtual bool is_parent_search_enabled() = 0;
  virtual void set_parent_search_enabled(bool) = 0;
  virtual void* load_library(AsciiChar const* path) = 0;
  virtual void deregister_library(void* handle) = 0;
  virtual bool register_creator(IPluginCreatorInterface&, AsciiChar const*) = 0;
  virtual IPluginCreatorInterface* const* creators(int32_t* count) = 0;
  virtual IPluginCreatorInterface* creator(AsciiChar const* name, AsciiChar const* version, AsciiChar const* space) = 0;
};

class Registry11 {
 public:
  virtual ~Registry11() = default;
  virtual void set_error_recorder() = 0;
  virtual void error_recorder() = 0;
  virtual bool is_parent_search_enabled() = 0;
  virtual void set_parent_search_enabled(bool) = 0;
  virtual void* load_library(AsciiChar const* path) = 0;
  virtual void deregister_library(void* handle) = 0;
  virtual bool register_creator(IPluginCreatorInterface&, AsciiChar const*) = 0;
  virtual IPluginCreatorInterface* const* creators(int32_t* count) = 0;
  virtual IPluginCreatorInterface* creator(AsciiChar const* name, AsciiChar const* version, AsciiChar const* space) = 0;
};

namespace {

template <class Function>
Function* find(void* library, char const* name) {
  void* const symbol = dlsym(library, name);
  must(symbol != nullptr, dlerror());
  return reinterpret_cast<Function*>(symbol);
}

void* open_library(std::string const& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  must(handle != nullptr, handle ? "" : dlerror());
  return handle;
}

template <class Registry>
Creators ask(void* registry, std::string const& plugins) {
  auto* const typed = static_cast<Registry*>(registry);
  must(typed->load_library(plugins.c_str()) != nullptr, "loadLibrary returned nothing");
  auto const creator = [typed](char const* name) {
    auto* const found = static_cast<IPluginCreatorV3One*>(typed->creator(name, "1", "hstu.trt"));
    must(found != nullptr, "the registry does not know a plugin of the library");
    return found;
  };
  Creators result;
  result.attention = creator("HstuAttention");
  result.embedding = creator("EmbeddingLookup");
  return result;
}

void* g_stand_in = nullptr;

}  // namespace

Creators load_direct(std::string const& plugins, std::string const& stand_in) {
  g_stand_in = open_library(stand_in);
  void* const library = open_library(plugins);
  find<void(void*)>(library, "setLoggerFinder")(find<void*()>(g_stand_in, "hstu_trt_stand_in_finder")());
  int32_t count = 0;
  auto* const creators = find<IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(count);
  must(count == 2, "getCreators does not return two creators");
  Creators result;
  result.attention = static_cast<IPluginCreatorV3One*>(creators[0]);
  result.embedding = static_cast<IPluginCreatorV3One*>(creators[1]);
  result.source = "getCreators";
  result.stand_in = true;
  return result;
}

Creators load_through(std::string const& runtime, std::string const& plugins) {
  void* const library = open_library(runtime);
  int32_t const version = find<int32_t()>(library, "getInferLibVersion")();
  int32_t const major = version / 10000;
  must(major == 10 || major == 11, "the runtime is neither TensorRT 10 nor 11");
  void* const registry = find<void*()>(library, "getPluginRegistry")();
  must(registry != nullptr, "TensorRT has no plugin registry");
  Creators result = major == 10 ? ask<Registry10>(registry, plugins) : ask<Registry11>(registry, plugins);
  result.source = "registry of TensorRT " + std::to_string(major) + "." + std::to_string(version / 100 % 100);
  return result;
}

std::string take_log() { return g_stand_in ? find<char const*()>(g_stand_in, "hstu_trt_stand_in_take_log")() : ""; }

int stand_in_resources() { return find<int()>(g_stand_in, "hstu_trt_stand_in_resources")(); }

int stand_in_clones() { return find<int()>(g_stand_in, "hstu_trt_stand_in_clones")(); }

}  // namespace hstu_trt::host
