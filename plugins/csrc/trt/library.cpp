// SPDX-License-Identifier: Apache-2.0
// The two functions that libhstu_trt_plugins.so exports: what IPluginRegistry::loadLibrary looks for.
#include <NvInferRuntime.h>

#include "attention_plugin.h"
#include "embedding_plugin.h"
#include "runtime.h"

#define HSTU_TRT_EXPORT extern "C" __attribute__((visibility("default")))

HSTU_TRT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using namespace hstu_trt::trt;
  // Never destroyed: TensorRT's registry may ask them when the process ends, after our static objects have gone.
  static nvinfer1::IPluginCreatorInterface* const creators[] = {new Creator<HstuAttention, AttentionAttributes>,
                                                                new Creator<EmbeddingLookup, EmbeddingAttributes>};
  count = 2;
  return creators;
}

HSTU_TRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { hstu_trt::trt::set_logger_finder(finder); }
