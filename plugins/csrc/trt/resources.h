// SPDX-License-Identifier: Apache-2.0
// Resources that plugins share under a key: those of TensorRT's registry, or where it may not be called (runtime.h),
// a list of our own with the same rules.
#pragma once

#include <NvInferRuntime.h>

namespace hstu_trt::trt {

// The resource of that key. The first caller's `prototype` is cloned and kept. nullptr if that fails.
nvinfer1::IPluginResource* acquire_resource(char const* key, nvinfer1::IPluginResource& prototype) noexcept;

// One release per acquire; the last releases and deletes the resource.
void release_resource(char const* key) noexcept;

}  // namespace hstu_trt::trt
