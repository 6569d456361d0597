// SPDX-License-Identifier: Apache-2.0
#include "hot_rows.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace hstu_trt::trt {

int64_t wanted_hot_rows(std::string const& name, int64_t rows) {
  char const* const text = std::getenv(kHotRowsVariable);
  int64_t found = rows;
  for (char const* at = text ? text : ""; *at;) {
    size_t const length = std::strcspn(at, ",");
    std::string const entry(at, length);
    at += length + (at[length] == ',');
    size_t const equals = entry.find('=');
    char const* const digits = equals == std::string::npos ? "" : entry.c_str() + equals + 1;
    char* end = nullptr;
    // Not all that strtoll takes is a number of rows: it skips blanks, takes signs, and makes 0 of no digits at all.
    long long const number = std::isdigit(static_cast<unsigned char>(*digits)) ? std::strtoll(digits, &end, 10) : -1;
    if (number < 0 || *end != '\0' || equals == 0) {
      throw std::runtime_error(std::string(kHotRowsVariable) + "=" + text + ": '" + entry + "' is not TABLE=ROWS");
    }
    if (entry.compare(0, equals, name) == 0) found = std::min<int64_t>(number, rows);
  }
  return found;
}

}  // namespace hstu_trt::trt
