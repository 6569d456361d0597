// SPDX-License-Identifier: Apache-2.0
// The TensorRT that runs in this process, seen from a library that is not linked to it.
#pragma once

#include <NvInferRuntime.h>

namespace hstu_trt::trt {

// Remembers the finder that TensorRT passes to setLoggerFinder. It also tells which library is at work: the one that
// the finder's code belongs to.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Interfaces that TensorRT implements (registry, logger finder) may be called only if the TensorRT that loaded us is of
// the major version of the headers we were compiled with: their virtual tables differ between 10 and 11, unlike those
// of the interfaces that plugins implement. In another, the two below find nothing.

// The logger of the engine or builder at work in this thread; nullptr if there is none, or none that may be asked.
nvinfer1::ILogger* find_logger() noexcept;

// The plugin registry; nullptr if there is none, or none that may be called.
nvinfer1::IPluginRegistry* find_registry() noexcept;

}  // namespace hstu_trt::trt
