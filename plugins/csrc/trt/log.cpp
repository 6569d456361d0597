// SPDX-License-Identifier: Apache-2.0
#include "log.h"

#include <NvInferRuntime.h>

#include <cstdarg>
#include <cstdio>

#include "runtime.h"

namespace hstu_trt::trt {
namespace {

using Severity = nvinfer1::ILogger::Severity;

constexpr size_t kLongestSentence = 1024;

void write(Severity severity, char const* format, va_list arguments) noexcept {
  char sentence[kLongestSentence];
  std::vsnprintf(sentence, sizeof(sentence), format, arguments);
  if (nvinfer1::ILogger* const logger = find_logger()) {
    logger->log(severity, sentence);
  } else if (severity <= Severity::kWARNING) {
    std::fprintf(stderr, "[hstu.trt] %s: %s\n", severity == Severity::kWARNING ? "warning" : "error", sentence);
  }
}

}  // namespace

void log_error(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  write(Severity::kERROR, format, arguments);
  va_end(arguments);
}

void log_warning(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  write(Severity::kWARNING, format, arguments);
  va_end(arguments);
}

void log_info(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  write(Severity::kINFO, format, arguments);
  va_end(arguments);
}

void log_verbose(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  write(Severity::kVERBOSE, format, arguments);
  va_end(arguments);
}

}  // namespace hstu_trt::trt
