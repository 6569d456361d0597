// SPDX-License-Identifier: Apache-2.0
// HstuAttention of contract/ops.py as a TensorRT plugin. The kernel's state is all in its workspace, so that clones and
// streams do not meet.
#pragma once

#include "attention_call.h"
#include "plugin.h"

namespace hstu_trt::trt {

class HstuAttention final : public Plugin<HstuAttention, AttentionAttributes> {
 public:
  static constexpr char kName[] = "HstuAttention";

  using Plugin::Plugin;

  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t output_count) const noexcept override;

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 private:
  char const* format_fault(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                           int32_t input_count) const noexcept;

  int32_t input_count_ = kRequiredInputs;
};

}  // namespace hstu_trt::trt
