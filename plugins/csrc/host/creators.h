// SPDX-License-Identifier: Apache-2.0
// Where the host gets its creators from: the plugin library itself, or a real TensorRT's registry.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace hstu_trt::host {

struct Creators {
  nvinfer1::IPluginCreatorV3One* attention = nullptr;
  nvinfer1::IPluginCreatorV3One* embedding = nullptr;
  std::string source;     // in words
  bool stand_in = false;  // the log and the registry are the stand-in's
};

// dlopen and getCreators, as TensorRT does it, with the stand-in (stand_in.h) for TensorRT.
Creators load_direct(std::string const& plugins, std::string const& stand_in);

// loadLibrary of the registry in `runtime`, a libnvinfer or libnvinfer_lean of major version 10 or 11.
Creators load_through(std::string const& runtime, std::string const& plugins);

// The stand-in's log since the last call; empty with a real TensorRT.
std::string take_log();
int stand_in_resources();
int stand_in_clones();

}  // namespace hstu_trt::host
