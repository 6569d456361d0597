// SPDX-License-Identifier: Apache-2.0
// EmbeddingLookup of contract/ops.py as a TensorRT plugin, in two forms.
//
//   two inputs, ids and table: the table is a tensor of the engine
//   one input, ids:            the table is found by table_name in the folder HSTU_TRT_TABLES, and shared by all
//   engines; its manifest says how ids become rows, the environment which rows are in GPU memory
//
// With the attribute status there is a second output: where each row came from.
#pragma once

#include <memory>
#include <string>

#include "../kernels/embedding/params.h"
#include "plugin.h"
#include "shared_table.h"

namespace hstu_trt::trt {

struct EmbeddingAttributes {
  std::string table_name;
  int32_t output_type = 1;
  std::string policy = "zero";
  int32_t has_padding = 0;
  int32_t padding_id = 0;
  int32_t status = 0;
  // Of a table found by its name: set when the engine is built, kept in the plan. 0: the table is the second input.
  int32_t dim = 0;

  template <class Self, class Visitor>
  static void visit(Self& self, Visitor& visitor) {
    visit_announced(self, visitor);
    visitor("dim", self.dim);
  }
  template <class Self, class Visitor>
  static void visit_announced(Self& self, Visitor& visitor) {
    visitor("table_name", self.table_name);
    visitor("output_type", self.output_type);
    visitor("policy", self.policy);
    visitor("has_padding", self.has_padding);
    visitor("padding_id", self.padding_id);
    visitor("status", self.status);
  }

  char const* fault() const noexcept;
};

class EmbeddingLookup final : public Plugin<EmbeddingLookup, EmbeddingAttributes> {
 public:
  static constexpr char kName[] = "EmbeddingLookup";

  using Plugin::Plugin;

  int32_t getNbOutputs() const noexcept override { return attributes_.status ? 2 : 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t output_count) const noexcept override;

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 private:
  bool by_name() const noexcept { return attributes_.dim > 0; }
  bool counts_fit(int32_t input_count, int32_t output_count) const noexcept {
    return output_count == getNbOutputs() && (input_count == 1 || input_count == 2);
  }
  char const* read(EmbeddingParams& params, nvinfer1::PluginTensorDesc const* inputs,
                   nvinfer1::PluginTensorDesc const* outputs) const noexcept;
  char const* read_table(EmbeddingColumns& columns, nvinfer1::PluginTensorDesc const& input) const noexcept;

  std::shared_ptr<SharedTable const> table_;
};

}  // namespace hstu_trt::trt
