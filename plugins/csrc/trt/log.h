// SPDX-License-Identifier: Apache-2.0
// Sentences to TensorRT's logger. Where none can be asked (runtime.h), warnings and errors go to stderr.
#pragma once

#include <exception>
#include <utility>

namespace hstu_trt::trt {

[[gnu::format(printf, 1, 2)]] void log_error(char const* format, ...) noexcept;
[[gnu::format(printf, 1, 2)]] void log_warning(char const* format, ...) noexcept;
[[gnu::format(printf, 1, 2)]] void log_info(char const* format, ...) noexcept;
[[gnu::format(printf, 1, 2)]] void log_verbose(char const* format, ...) noexcept;

// What `function` returns, or `otherwise` with a sentence if it throws: TensorRT's interfaces are noexcept, and an
// exception that escaped one would end the server.
template <class Result, class Function>
Result guarded(char const* plugin, char const* method, Result otherwise, Function&& function) noexcept {
  try {
    return std::forward<Function>(function)();
  } catch (std::exception const& error) {
    log_error("%s: %s: %s", plugin, method, error.what());
  } catch (...) {
    log_error("%s: %s: an exception of unknown type", plugin, method);
  }
  return otherwise;
}

}  // namespace hstu_trt::trt
