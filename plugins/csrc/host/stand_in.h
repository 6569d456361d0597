// SPDX-License-Identifier: Apache-2.0
// A stand-in for TensorRT, in a library of its own, with what plugins ask TensorRT for: its version, a logger, and a
// registry that shares resources. Plugins look for these in the library that called setLoggerFinder.
#pragma once

#include <string>

// The sentences logged since the last call, one per line.
extern "C" __attribute__((visibility("default"))) char const* hstu_trt_stand_in_take_log();
// Resources that are registered, and how often one was cloned.
extern "C" __attribute__((visibility("default"))) int hstu_trt_stand_in_resources();
extern "C" __attribute__((visibility("default"))) int hstu_trt_stand_in_clones();
extern "C" __attribute__((visibility("default"))) void* hstu_trt_stand_in_finder();
