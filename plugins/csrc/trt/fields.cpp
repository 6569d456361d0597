// SPDX-License-Identifier: Apache-2.0
#include "fields.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace hstu_trt::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace {

[[noreturn]] void refuse(std::string const& name, char const* why) {
  throw std::invalid_argument("field '" + name + "' " + why);
}

// Fields need not be aligned: they may come from a plan.
template <class Number>
Number load(PluginField const& field) {
  Number value;
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

void need_one(PluginField const& field) {
  if (field.length != 1) refuse(field.name, "must hold one value");
}

PluginFieldCollection const* make_collection(PluginFieldCollection& collection,
                                             std::vector<PluginField> const& fields) noexcept {
  collection = {static_cast<int32_t>(fields.size()), fields.data()};
  return &collection;
}

}  // namespace

FieldReader::FieldReader(PluginFieldCollection const* fields) {
  if (!fields) throw std::invalid_argument("there is no collection of fields");
  if (fields->nbFields < 0 || (fields->nbFields > 0 && !fields->fields)) {
    throw std::invalid_argument("the collection of fields is broken");
  }
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    if (!field.name) throw std::invalid_argument("a field has no name");
    if (!field.data) refuse(field.name, "has no data");
    left_.push_back(&field);
  }
}

PluginField const* FieldReader::take(char const* name) {
  auto const found = std::find_if(left_.begin(), left_.end(),
                                  [name](PluginField const* field) { return std::strcmp(field->name, name) == 0; });
  if (found == left_.end()) return nullptr;
  PluginField const* const field = *found;
  left_.erase(found);
  return field;
}

void FieldReader::operator()(char const* name, int32_t& value) {
  PluginField const* const field = take(name);
  if (!field) return;
  need_one(*field);
  int64_t wide = 0;
  switch (field->type) {
    case PluginFieldType::kINT32: wide = load<int32_t>(*field); break;
    case PluginFieldType::kINT64: wide = load<int64_t>(*field); break;
    default: refuse(name, "must be INT32 or INT64");
  }
  if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max()) {
    refuse(name, "does not fit 32 bits");
  }
  value = static_cast<int32_t>(wide);
}

void FieldReader::operator()(char const* name, float& value) {
  PluginField const* const field = take(name);
  if (!field) return;
  need_one(*field);
  switch (field->type) {
    case PluginFieldType::kFLOAT32: value = load<float>(*field); break;
    case PluginFieldType::kFLOAT64: value = static_cast<float>(load<double>(*field)); break;
    default: refuse(name, "must be FLOAT32 or FLOAT64");
  }
}

// A string may come with its final zero or without.
void FieldReader::operator()(char const* name, std::string& value) {
  PluginField const* const field = take(name);
  if (!field) return;
  if (field->type != PluginFieldType::kCHAR || field->length < 0) refuse(name, "must be CHAR");
  auto const* const text = static_cast<char const*>(field->data);
  value.assign(text, strnlen(text, static_cast<size_t>(field->length)));
}

void FieldReader::refuse_unknown() const {
  if (left_.empty()) return;
  refuse(left_.front()->name, "is no attribute of this plugin, or is given twice");
}

PluginFieldCollection const* FieldNames::collection() noexcept { return make_collection(collection_, fields_); }

PluginFieldCollection const* FieldWriter::collection() noexcept { return make_collection(collection_, fields_); }

void FieldText::operator()(char const* name, int32_t value) { (*this)(name, std::to_string(value)); }

// Nine digits tell any two floats apart.
void FieldText::operator()(char const* name, float value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.9g", static_cast<double>(value));
  (*this)(name, std::string(digits));
}

void FieldText::operator()(char const* name, std::string const& value) {
  text_ += (text_.empty() ? "" : ",") + std::string(name) + "=" + value;
}

}  // namespace hstu_trt::trt
