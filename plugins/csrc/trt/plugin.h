// SPDX-License-Identifier: Apache-2.0
// What the plugins share: identity, capabilities, cloning, serialisation; and their creator.
//
// A plugin derives from Plugin<Itself, ItsAttributes> and adds the shapes, types, workspace and enqueue. Attributes
// have visit() (fields.h), and fault(): nullptr, or a sentence on a value that makes no sense.
#pragma once

#include <NvInferRuntime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "fields.h"
#include "log.h"

namespace hstu_trt::trt {

constexpr char kNamespace[] = "hstu.trt";
constexpr char kVersion[] = "1";

// What methods of TensorRT's interfaces return.
constexpr int32_t kOk = 0;
constexpr int32_t kRefused = -1;

template <class Derived, class Attributes>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(Attributes attributes, nvinfer1::TensorRTPhase phase) : attributes_(std::move(attributes)), phase_(phase) {}

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded(Derived::kName, "clone", static_cast<nvinfer1::IPluginV3*>(nullptr),
                   [this]() -> nvinfer1::IPluginV3* { return copy(); });
  }

  // IPluginV3OneCore
  char const* getPluginName() const noexcept override { return Derived::kName; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuildV2. No tactics: TensorRT would time them, and it times on tensors whose contents it makes up.
  // The launchers choose a kernel for the GPU that they run on.
  int32_t getNbOutputs() const noexcept override { return 1; }

  char const* getTimingCacheID() noexcept override { return getMetadataString(); }

  char const* getMetadataString() noexcept override {
    return guarded(Derived::kName, "getMetadataString", static_cast<char const*>(nullptr), [this]() -> char const* {
      FieldText text;
      Attributes::visit(attributes_, text);
      text_ = text.text();
      return text_.c_str();
    });
  }

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override {
    if (tactic == 0) return kOk;
    log_error("%s: there is no tactic %d: this plugin has the default tactic alone", Derived::kName, tactic);
    return kRefused;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    return guarded(Derived::kName, "getFieldsToSerialize", static_cast<nvinfer1::PluginFieldCollection const*>(nullptr),
                   [this] {
                     written_ = FieldWriter();
                     Attributes::visit(attributes_, written_);
                     return written_.collection();
                   });
  }

 protected:
  Plugin(Plugin const& other) : attributes_(other.attributes_), phase_(other.phase_) {}
  Plugin& operator=(Plugin const&) = delete;

  Derived* copy() const { return new Derived(static_cast<Derived const&>(*this)); }

  bool building() const noexcept { return phase_ == nvinfer1::TensorRTPhase::kBUILD; }

  // Logs the sentence, if there is one.
  static int32_t answer(char const* method, char const* sentence) noexcept {
    if (!sentence) return kOk;
    log_error("%s: %s: %s", Derived::kName, method, sentence);
    return kRefused;
  }

  // For supportsFormatCombination: a builder may ask about many combinations, of which one has to fit.
  static bool supports(char const* sentence) noexcept {
    if (sentence) log_verbose("%s: supportsFormatCombination: %s", Derived::kName, sentence);
    return !sentence;
  }

  Attributes attributes_;

 private:
  nvinfer1::TensorRTPhase phase_;
  std::string text_;
  FieldWriter written_;
};

template <class P, class Attributes>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    Attributes const defaults;
    Attributes::visit_announced(defaults, names_);
  }

  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    char const* const layer = name && *name ? name : "createPlugin";
    return guarded(P::kName, layer, static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
      Attributes attributes;
      FieldReader reader(fields);
      Attributes::visit(attributes, reader);
      reader.refuse_unknown();
      if (char const* const fault = attributes.fault()) throw std::invalid_argument(fault);
      return new P(std::move(attributes), phase);
    });
  }

  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return names_.collection(); }

  char const* getPluginName() const noexcept override { return P::kName; }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  FieldNames names_;
};

}  // namespace hstu_trt::trt
