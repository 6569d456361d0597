// SPDX-License-Identifier: Apache-2.0
#include "embedding_plugin.h"

#include "../kernels/embedding/embedding.h"
#include "stored_table.h"
#include "types.h"

namespace hstu_trt::trt {

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using Type = nvinfer1::DataType;

namespace {

constexpr char const* kWrongCount = "there must be one output, and one input (ids) or two (ids, table)";

bool counts_fit(int32_t input_count, int32_t output_count) {
  return output_count == 1 && (input_count == 1 || input_count == 2);
}

bool is_table(Type type) { return type == Type::kFLOAT || type == Type::kHALF || type == Type::kBF16; }

// A length that a kernel may be called with.
bool is_length(int64_t length) { return length >= 0 && length <= INT32_MAX; }

}  // namespace

char const* EmbeddingAttributes::fault() const noexcept {
  if (dim < 0) return "dim must not be negative";
  if (dim > 0 && table_name.empty()) return "table_name must name the table";
  switch (static_cast<OnnxType>(output_type)) {
    case OnnxType::kFloat32:
    case OnnxType::kFloat16: return nullptr;
    default: return "output_type must be 1 (FP32) or 10 (FP16), as ONNX numbers types";
  }
}

int32_t EmbeddingLookup::getOutputDataTypes(Type* outputs, int32_t output_count, Type const* inputs,
                                            int32_t input_count) const noexcept {
  constexpr char kMethod[] = "getOutputDataTypes";
  if (!counts_fit(input_count, output_count)) return answer(kMethod, kWrongCount);
  if (!is_index(inputs[0])) return answer(kMethod, "ids must be INT32 or INT64");
  if (input_count == 2 && !is_table(inputs[1])) return answer(kMethod, "the table must be FP32, FP16 or BF16");
  outputs[0] = onnx_type(attributes_.output_type);
  return kOk;
}

int32_t EmbeddingLookup::getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t,
                                         DimsExprs* outputs, int32_t output_count,
                                         nvinfer1::IExprBuilder& builder) noexcept {
  constexpr char kMethod[] = "getOutputShapes";
  if (!counts_fit(input_count, output_count)) return answer(kMethod, kWrongCount);
  if (inputs[0].nbDims != 1) return answer(kMethod, "ids must have one axis");
  if (input_count == 2 && inputs[1].nbDims != 2) return answer(kMethod, "the table must have two axes: rows, dim");
  return guarded(kName, kMethod, kRefused, [&] {
    // One input alone: the plan has to know the width of a row that is elsewhere.
    if (input_count == 1 && !by_name()) attributes_.dim = find_stored_table(attributes_.table_name).dim;
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = input_count == 2 ? inputs[1].d[1] : builder.constant(attributes_.dim);
    return kOk;
  });
}

bool EmbeddingLookup::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                                int32_t input_count, int32_t output_count) noexcept {
  if (!counts_fit(input_count, output_count)) return supports(kWrongCount);
  if (position < 0 || position > input_count) return supports("there is no tensor at this position");
  PluginTensorDesc const& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return supports("tensors must be linear");
  if (position == input_count) {
    bool const fits = tensor.type == onnx_type(attributes_.output_type);
    return supports(fits ? nullptr : "the output's type is not output_type");
  }
  if (position == 0) return supports(is_index(tensor.type) ? nullptr : "ids must be INT32 or INT64");
  return supports(is_table(tensor.type) ? nullptr : "the table must be FP32, FP16 or BF16");
}

int32_t EmbeddingLookup::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                         DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept {
  constexpr char kMethod[] = "configurePlugin";
  if (!counts_fit(input_count, output_count)) return answer(kMethod, kWrongCount);
  auto const largest = [](DynamicPluginTensorDesc const& tensor) {
    return PluginTensorDesc{tensor.max, tensor.desc.type, tensor.desc.format, 1.f};
  };
  attributes_.dim = input_count == 1 ? static_cast<int32_t>(outputs[0].max.d[1]) : 0;
  PluginTensorDesc const bounds[] = {largest(inputs[0]), largest(inputs[input_count - 1])};
  EmbeddingParams params;
  return answer(kMethod, read(params, bounds, largest(outputs[0])));
}

nvinfer1::IPluginV3* EmbeddingLookup::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return guarded(kName, "attachToContext", static_cast<nvinfer1::IPluginV3*>(nullptr),
                 [this]() -> nvinfer1::IPluginV3* {
                   std::unique_ptr<EmbeddingLookup> attached(copy());
                   // Where an engine is built, the table need not be: ids then find no row.
                   if (!by_name() || building()) return attached.release();
                   attached->table_ = acquire_table(attributes_.table_name);
                   if (attached->table_->dim() != attributes_.dim) {
                     throw std::runtime_error("table '" + attributes_.table_name + "' has " +
                                              std::to_string(attached->table_->dim()) +
                                              " columns, the engine was built for " + std::to_string(attributes_.dim));
                   }
                   return attached.release();
                 });
}

int32_t EmbeddingLookup::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count,
                                       PluginTensorDesc const* outputs, int32_t output_count) noexcept {
  constexpr char kMethod[] = "onShapeChange";
  if (!counts_fit(input_count, output_count)) return answer(kMethod, kWrongCount);
  if (by_name() != (input_count == 1)) return answer(kMethod, "the number of inputs is not that of the plan");
  EmbeddingParams params;
  return answer(kMethod, read(params, inputs, outputs[0]));
}

int32_t EmbeddingLookup::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const* output_descs,
                                 void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  constexpr char kMethod[] = "enqueue";
  EmbeddingParams params;
  if (char const* const fault = read(params, input_descs, output_descs[0])) return answer(kMethod, fault);
  if (by_name() && !table_ && !building()) return answer(kMethod, "the plugin was never attached to a context");
  params.ids = inputs[0];
  params.out = outputs[0];
  if (!by_name()) params.table.data = inputs[1];
  if (table_) params.live_table = table_->live();
  char const* const sentence = embedding_unsupported(params);
  if (sentence) return answer(kMethod, sentence);
  cudaError_t const error = launch_embedding_lookup(params, stream);
  return answer(kMethod, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}

// Everything but addresses.
char const* EmbeddingLookup::read(EmbeddingParams& params, PluginTensorDesc const* inputs,
                                  PluginTensorDesc const& output) const noexcept {
  params = {};
  Dims const &ids = inputs[0].dims, &out = output.dims;
  if (ids.nbDims != 1 || !is_length(ids.d[0])) return "ids must have one axis";
  if (!is_index(inputs[0].type)) return "ids must be INT32 or INT64";
  if (out.nbDims != 2 || out.d[0] != ids.d[0] || !is_length(out.d[1])) return "the output must be [ids, dim]";
  if (output.type != onnx_type(attributes_.output_type)) return "the output's type is not output_type";
  params.dim = static_cast<int32_t>(out.d[1]);
  params.count = ids.d[0];
  params.wide_ids = inputs[0].type == Type::kINT64;
  convert(output.type, params.output_type);
  if (by_name()) {
    params.type = table_ ? table_->type() : params.output_type;
    return params.dim == attributes_.dim ? nullptr : "the output has not the table's width";
  }
  Dims const& table = inputs[1].dims;
  if (table.nbDims != 2 || table.d[0] < 0 || table.d[1] != out.d[1]) return "the table must be [rows, dim]";
  if (!is_table(inputs[1].type)) return "the table must be FP32, FP16 or BF16";
  convert(inputs[1].type, params.type);
  params.table.rows = table.d[0];
  return nullptr;
}

}  // namespace hstu_trt::trt
