// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace hstu_trt::trt {
namespace {

constexpr int kDeepest = 32;
constexpr double kLargestCount = 9007199254740992.;  // 2^53

[[noreturn]] void fail(char const* what) { throw std::invalid_argument(std::string("JSON: ") + what); }

}  // namespace

// Recursive descent. `text` ends with a zero, which is none of the characters looked for.
class JsonReader {
 public:
  explicit JsonReader(char const* text) : at_(text) {}

  Json document() {
    Json result = value(0);
    skip_space();
    if (*at_ != '\0') fail("something follows the document");
    return result;
  }

 private:
  void skip_space() {
    while (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t') ++at_;
  }

  bool take(char letter) {
    skip_space();
    if (*at_ != letter) return false;
    ++at_;
    return true;
  }

  void expect(char letter, char const* otherwise) {
    if (!take(letter)) fail(otherwise);
  }

  bool take_word(char const* word) {
    size_t const length = std::strlen(word);
    if (std::strncmp(at_, word, length) != 0) return false;
    at_ += length;
    return true;
  }

  Json value(int depth) {
    if (depth > kDeepest) fail("nested too deeply");
    Json result;
    skip_space();
    if (*at_ == '{') {
      result.value_ = object(depth);
    } else if (*at_ == '[') {
      result.value_ = array(depth);
    } else if (*at_ == '"') {
      result.value_ = string();
    } else if (take_word("true")) {
      result.value_ = true;
    } else if (take_word("false")) {
      result.value_ = false;
    } else if (take_word("null")) {
      result.value_ = nullptr;
    } else {
      result.value_ = number();
    }
    return result;
  }

  std::map<std::string, Json> object(int depth) {
    std::map<std::string, Json> result;
    expect('{', "an object was expected");
    if (take('}')) return result;
    do {
      skip_space();
      std::string const key = string();
      expect(':', "':' was expected");
      if (!result.emplace(key, value(depth + 1)).second) fail("a key stands twice in an object");
    } while (take(','));
    expect('}', "'}' was expected");
    return result;
  }

  std::vector<Json> array(int depth) {
    std::vector<Json> result;
    expect('[', "an array was expected");
    if (take(']')) return result;
    do {
      result.push_back(value(depth + 1));
    } while (take(','));
    expect(']', "']' was expected");
    return result;
  }

  std::string string() {
    if (*at_ != '"') fail("a string was expected");
    std::string result;
    for (++at_; *at_ != '"'; ++at_) {
      if (static_cast<unsigned char>(*at_) < ' ') fail("a string does not end");
      result += *at_ == '\\' ? escaped() : *at_;
    }
    ++at_;
    return result;
  }

  // Names of tables and files are ASCII: of \u, those are understood.
  char escaped() {
    switch (*++at_) {
      case '"': return '"';
      case '\\': return '\\';
      case '/': return '/';
      case 'b': return '\b';
      case 'f': return '\f';
      case 'n': return '\n';
      case 'r': return '\r';
      case 't': return '\t';
      case 'u': return ascii();
      default: fail("an unknown escape in a string");
    }
  }

  char ascii() {
    int code = 0;
    for (int digit = 0; digit < 4; ++digit) {
      ++at_;
      if (!std::isxdigit(static_cast<unsigned char>(*at_))) fail("four hex digits were expected");
      char const text[] = {*at_, '\0'};
      code = 16 * code + static_cast<int>(std::strtol(text, nullptr, 16));
    }
    return code < 128 ? static_cast<char>(code) : '?';
  }

  double number() {
    if (*at_ != '-' && !std::isdigit(static_cast<unsigned char>(*at_))) fail("a value was expected");
    char* end = nullptr;
    double const result = std::strtod(at_, &end);
    at_ = end;
    return result;
  }

  char const* at_;
};

Json Json::parse(std::string const& text) { return JsonReader(text.c_str()).document(); }

Json const& Json::at(std::string const& key) const {
  auto const* const object = std::get_if<std::map<std::string, Json>>(&value_);
  if (!object) fail("an object was expected");
  auto const found = object->find(key);
  if (found == object->end()) fail(("there is no '" + key + "'").c_str());
  return found->second;
}

Json const& Json::at(size_t index) const {
  if (index >= items().size()) fail("an array is too short");
  return items()[index];
}

std::vector<Json> const& Json::items() const {
  auto const* const array = std::get_if<std::vector<Json>>(&value_);
  if (!array) fail("an array was expected");
  return *array;
}

std::string const& Json::text() const {
  auto const* const string = std::get_if<std::string>(&value_);
  if (!string) fail("a string was expected");
  return *string;
}

int64_t Json::count() const {
  auto const* const number = std::get_if<double>(&value_);
  if (!number || *number < 0 || *number > kLargestCount || *number != std::floor(*number)) {
    fail("an integer of at least 0 was expected");
  }
  return static_cast<int64_t>(*number);
}

}  // namespace hstu_trt::trt
