// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <cctype>
#include <cerrno>
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
      number(result);
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

  // Whole numbers keep their 64 bits, which a double does not.
  void number(Json& result) {
    if (*at_ != '-' && !std::isdigit(static_cast<unsigned char>(*at_))) fail("a value was expected");
    char *end = nullptr, *whole_end = nullptr;
    double const real = std::strtod(at_, &end);
    errno = 0;
    uint64_t const whole = std::strtoull(at_, &whole_end, 10);
    if (*at_ != '-' && whole_end == end && errno == 0) {
      result.value_ = whole;
    } else {
      result.value_ = real;
    }
    at_ = end;
  }

  char const* at_;
};

Json Json::parse(std::string const& text) { return JsonReader(text.c_str()).document(); }

std::map<std::string, Json> const& Json::entries() const {
  auto const* const object = std::get_if<std::map<std::string, Json>>(&value_);
  if (!object) fail("an object was expected");
  return *object;
}

Json const* Json::find(std::string const& key) const {
  auto const found = entries().find(key);
  return found == entries().end() ? nullptr : &found->second;
}

Json const& Json::at(std::string const& key) const {
  Json const* const found = find(key);
  if (!found) fail(("there is no '" + key + "'").c_str());
  return *found;
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
  auto const* const integer = std::get_if<uint64_t>(&value_);
  double const value = integer ? static_cast<double>(*integer) : number ? *number : -1.;
  if (value < 0 || value > kLargestCount || value != std::floor(value)) fail("an integer of at least 0 was expected");
  return static_cast<int64_t>(value);
}

uint64_t Json::whole() const {
  auto const* const number = std::get_if<uint64_t>(&value_);
  if (!number) fail("an integer of 64 bits was expected");
  return *number;
}

}  // namespace hstu_trt::trt
