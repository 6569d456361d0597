// SPDX-License-Identifier: Apache-2.0
// Attributes of a plugin as TensorRT's fields: read from a collection, listed by name, written for a plan, as text.
//
// Attributes are a struct with a static visit(self, visitor) that calls visitor(name, member) for each of its members:
// int32_t, float or std::string. The four visitors below do the rest.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace hstu_trt::trt {

// Reads the fields that are there and leaves the other attributes as they are. Throws std::invalid_argument for a field
// of a wrong type, length or range, and, when it is done, for fields that no attribute asked for.
class FieldReader {
 public:
  explicit FieldReader(nvinfer1::PluginFieldCollection const* fields);

  void operator()(char const* name, int32_t& value);
  void operator()(char const* name, float& value);
  void operator()(char const* name, std::string& value);

  void refuse_unknown() const;

 private:
  nvinfer1::PluginField const* take(char const* name);

  std::vector<nvinfer1::PluginField const*> left_;
};

// Names alone, as a creator announces them.
class FieldNames {
 public:
  template <class Value>
  void operator()(char const* name, Value const& value) {
    fields_.emplace_back(name, nullptr, type_of(value), 1);
  }

  nvinfer1::PluginFieldCollection const* collection() noexcept;

  static nvinfer1::PluginFieldType type_of(int32_t) noexcept { return nvinfer1::PluginFieldType::kINT32; }
  static nvinfer1::PluginFieldType type_of(float) noexcept { return nvinfer1::PluginFieldType::kFLOAT32; }
  static nvinfer1::PluginFieldType type_of(std::string const&) noexcept { return nvinfer1::PluginFieldType::kCHAR; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// Fields that point at the attributes, which must outlive them.
class FieldWriter {
 public:
  template <class Number>
  void operator()(char const* name, Number const& value) {
    fields_.emplace_back(name, &value, FieldNames::type_of(value), 1);
  }
  void operator()(char const* name, std::string const& value) {
    fields_.emplace_back(name, value.c_str(), nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(value.size() + 1));
  }

  nvinfer1::PluginFieldCollection const* collection() noexcept;

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// "alpha=0.125,causal=1": the same text for the same attributes.
class FieldText {
 public:
  void operator()(char const* name, int32_t value);
  void operator()(char const* name, float value);
  void operator()(char const* name, std::string const& value);

  std::string const& text() const noexcept { return text_; }

 private:
  std::string text_;
};

}  // namespace hstu_trt::trt
