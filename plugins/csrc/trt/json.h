// SPDX-License-Identifier: Apache-2.0
// As much JSON as a manifest needs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace hstu_trt::trt {

// A parsed document. Questions about what is not there, or of another type, throw std::invalid_argument.
class Json {
 public:
  // Throws std::invalid_argument for text that is not one JSON document.
  static Json parse(std::string const& text);

  Json const& at(std::string const& key) const;
  Json const& at(size_t index) const;
  std::vector<Json> const& items() const;
  std::string const& text() const;
  // nullptr if the object has no such key.
  Json const* find(std::string const& key) const;
  std::map<std::string, Json> const& entries() const;
  // An integer of at least 0 that a double holds exactly.
  int64_t count() const;
  // An integer of at least 0 and 64 bits.
  uint64_t whole() const;

 private:
  friend class JsonReader;

  std::variant<std::nullptr_t, bool, double, uint64_t, std::string, std::vector<Json>, std::map<std::string, Json>>
      value_;
};

}  // namespace hstu_trt::trt
