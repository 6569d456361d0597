// SPDX-License-Identifier: Apache-2.0
// Checks that are the same for both plugins.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "creators.h"
#include "handles.h"

namespace hstu_trt::host {

// With the stand-in, whether its log says `words`; with a real TensorRT nobody listens.
inline bool said(Creators const& creators, std::string const& words) {
  return !creators.stand_in || take_log().find(words) != std::string::npos;
}

// Fields that no plugin may be created from, with what has to be said about them.
struct Refused {
  char const* name;
  Fields fields;
  char const* words;
};

inline void check_refused(Checks& checks, Creators const& creators, nvinfer1::IPluginCreatorV3One& creator,
                          std::vector<Refused> const& list) {
  for (Refused const& one : list) {
    take_log();
    PluginHandle const plugin = create(creator, one.fields);
    checks.check(!plugin && said(creators, one.words), std::string("refused field: ") + one.name);
  }
  take_log();
  checks.check(!creator.createPlugin("layer", nullptr, TensorRTPhase::kBUILD) && said(creators, "no collection"),
               "refused field: no collection");
}

inline bool same_fields(nvinfer1::PluginFieldCollection const& a, nvinfer1::PluginFieldCollection const& b) {
  if (a.nbFields != b.nbFields) return false;
  for (int32_t i = 0; i < a.nbFields; ++i) {
    nvinfer1::PluginField const &x = a.fields[i], &y = b.fields[i];
    size_t const bytes = static_cast<size_t>(x.length) * (x.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4);
    if (std::strcmp(x.name, y.name) != 0 || x.type != y.type || x.length != y.length) return false;
    if (std::memcmp(x.data, y.data, bytes) != 0) return false;
  }
  return true;
}

// Identity, serialisation and copies of a plugin that was configured.
inline void check_life(Checks& checks, nvinfer1::IPluginCreatorV3One& creator, PluginHandle const& plugin) {
  std::string const name = creator.getPluginName();
  checks.check(plugin.core().getPluginName() == name && std::string(plugin.core().getPluginVersion()) == "1" &&
                   std::string(plugin.core().getPluginNamespace()) == "hstu.trt",
               name + ": name, version and namespace");
  checks.check(std::string(plugin.build().getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD" &&
                   plugin.build().getInterfaceInfo().major == 2 && plugin.build().getNbOutputs() == 1,
               name + ": OneBuildV2 with one output");
  checks.check(
      plugin.build().getNbTactics() == 0 && plugin.runtime().setTactic(0) == 0 && plugin.runtime().setTactic(3) != 0,
      name + ": the default tactic alone");
  nvinfer1::PluginFieldCollection const* const written = plugin.runtime().getFieldsToSerialize();
  PluginHandle const again(creator.createPlugin("layer", written, TensorRTPhase::kRUNTIME));
  std::string const id = plugin.build().getTimingCacheID();
  checks.check(
      again && same_fields(*written, *again.runtime().getFieldsToSerialize()) && again.build().getTimingCacheID() == id,
      name + ": created again from what was serialised");
  PluginHandle const clone(plugin->clone());
  checks.check(
      clone && clone.build().getTimingCacheID() == id && same_fields(*written, *clone.runtime().getFieldsToSerialize()),
      name + ": a clone is the same");
}

}  // namespace hstu_trt::host
