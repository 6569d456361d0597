// SPDX-License-Identifier: Apache-2.0
// A plugin and its three interfaces; fields to create it from; tensors as TensorRT describes them.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace hstu_trt::host {

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;
using Type = nvinfer1::DataType;

// Fields in memory of their own.
class Fields {
 public:
  Fields() = default;
  // Fields point at the memory of the object they were added to.
  Fields(Fields const& other) { *this = other; }
  Fields& operator=(Fields const& other) {
    if (this == &other) return *this;
    memory_.clear();
    fields_ = other.fields_;
    for (size_t i = 0; i < fields_.size(); ++i) {
      for (std::string const& kept : other.memory_) {
        if (kept.data() == fields_[i].data) fields_[i].data = memory_.emplace_back(kept).data();
      }
    }
    return *this;
  }

  Fields& add(char const* name, int32_t value) { return number(name, value, nvinfer1::PluginFieldType::kINT32); }
  Fields& add(char const* name, int64_t value) { return number(name, value, nvinfer1::PluginFieldType::kINT64); }
  Fields& add(char const* name, float value) { return number(name, value, nvinfer1::PluginFieldType::kFLOAT32); }
  Fields& add(char const* name, std::string const& value) {
    std::string const& kept = memory_.emplace_back(value);
    fields_.emplace_back(name, kept.c_str(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(kept.size() + 1));
    return *this;
  }
  Fields& add_raw(nvinfer1::PluginField const& field) {
    fields_.push_back(field);
    return *this;
  }

  nvinfer1::PluginFieldCollection collection() const { return {static_cast<int32_t>(fields_.size()), fields_.data()}; }

 private:
  template <class Number>
  Fields& number(char const* name, Number value, nvinfer1::PluginFieldType type) {
    std::string const& kept = memory_.emplace_back(reinterpret_cast<char const*>(&value), sizeof(value));
    fields_.emplace_back(name, kept.data(), type, 1);
    return *this;
  }

  std::deque<std::string> memory_;
  std::vector<nvinfer1::PluginField> fields_;
};

class PluginHandle {
 public:
  PluginHandle() = default;
  explicit PluginHandle(nvinfer1::IPluginV3* plugin) : plugin_(plugin) {}

  explicit operator bool() const { return plugin_ != nullptr; }
  nvinfer1::IPluginV3* operator->() const { return plugin_.get(); }
  nvinfer1::IPluginV3OneCore& core() const {
    return get<nvinfer1::IPluginV3OneCore>(nvinfer1::PluginCapabilityType::kCORE);
  }
  nvinfer1::IPluginV3OneBuildV2& build() const {
    return get<nvinfer1::IPluginV3OneBuildV2>(nvinfer1::PluginCapabilityType::kBUILD);
  }
  nvinfer1::IPluginV3OneRuntime& runtime() const {
    return get<nvinfer1::IPluginV3OneRuntime>(nvinfer1::PluginCapabilityType::kRUNTIME);
  }

 private:
  template <class Interface>
  Interface& get(nvinfer1::PluginCapabilityType type) const {
    return *static_cast<Interface*>(plugin_->getCapabilityInterface(type));
  }

  std::unique_ptr<nvinfer1::IPluginV3> plugin_;
};

inline PluginHandle create(nvinfer1::IPluginCreatorV3One& creator, Fields const& fields,
                           TensorRTPhase phase = TensorRTPhase::kRUNTIME) {
  nvinfer1::PluginFieldCollection const collection = fields.collection();
  return PluginHandle(creator.createPlugin("layer", &collection, phase));
}

inline Dims dims(std::initializer_list<int64_t> lengths) {
  Dims result{};
  for (int64_t const length : lengths) result.d[result.nbDims++] = length;
  return result;
}

inline PluginTensorDesc tensor(std::initializer_list<int64_t> lengths, Type type) {
  return {dims(lengths), type, nvinfer1::TensorFormat::kLINEAR, 1.f};
}

// Of one profile: the dimension `wild` lies between 1 and what `largest` says.
inline DynamicPluginTensorDesc dynamic(PluginTensorDesc const& largest) {
  DynamicPluginTensorDesc result{largest, largest.dims, largest.dims, largest.dims};
  result.desc.dims.d[0] = -1;
  result.min.d[0] = 1;
  return result;
}

inline std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& largest) {
  std::vector<DynamicPluginTensorDesc> result;
  for (PluginTensorDesc const& one : largest) result.push_back(dynamic(one));
  return result;
}

}  // namespace hstu_trt::host
