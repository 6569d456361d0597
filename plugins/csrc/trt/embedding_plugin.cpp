// SPDX-License-Identifier: Apache-2.0
#include "embedding_plugin.h"

#include <algorithm>
#include <iterator>

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

constexpr char const* kWrongCount =
    "there must be one output, or with status two, and one input (ids) or two (ids, table)";
constexpr size_t kLatchBytes = 256;  // a word, and what is expected of workspaces' alignment

// In the order of IdPolicy.
constexpr char const* kPolicies[] = {"reject", "zero", "clamp", "row0", "default_row"};

int find_policy(std::string const& name) {
  auto const found = std::find(std::begin(kPolicies), std::end(kPolicies), name);
  return found == std::end(kPolicies) ? -1 : static_cast<int>(found - kPolicies);
}

bool is_table(Type type) { return type == Type::kFLOAT || type == Type::kHALF || type == Type::kBF16; }

// A length that a kernel may be called with.
bool is_length(int64_t length) { return length >= 0 && length <= INT32_MAX; }

}  // namespace

char const* EmbeddingAttributes::fault() const noexcept {
  if (dim < 0) return "dim must not be negative";
  if (dim > 0 && table_name.empty()) return "table_name must name the table";
  if (find_policy(policy) < 0) return "policy must be reject, zero, clamp, row0 or default_row";
  if ((has_padding | status) & ~1) return "has_padding and status must be 0 or 1";
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
  if (attributes_.status) outputs[1] = Type::kINT32;
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
    if (input_count == 1 && !by_name()) {
      std::string const& name = attributes_.table_name;
      attributes_.dim = find_stored_table(tables_root("table '" + name + "'"), name).dim;
    }
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = input_count == 2 ? inputs[1].d[1] : builder.constant(attributes_.dim);
    if (attributes_.status) {
      outputs[1].nbDims = 1;
      outputs[1].d[0] = inputs[0].d[0];
    }
    return kOk;
  });
}

bool EmbeddingLookup::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                                int32_t input_count, int32_t output_count) noexcept {
  if (!counts_fit(input_count, output_count)) return supports(kWrongCount);
  if (position < 0 || position >= input_count + output_count) return supports("there is no tensor at this position");
  PluginTensorDesc const& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return supports("tensors must be linear");
  if (position == input_count) {
    bool const fits = tensor.type == onnx_type(attributes_.output_type);
    return supports(fits ? nullptr : "the output's type is not output_type");
  }
  if (position > input_count) return supports(tensor.type == Type::kINT32 ? nullptr : "the status must be INT32");
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
  PluginTensorDesc const in[] = {largest(inputs[0]), largest(inputs[input_count - 1])};
  PluginTensorDesc const out[] = {largest(outputs[0]), largest(outputs[output_count - 1])};
  EmbeddingParams params;
  return answer(kMethod, read(params, in, out));
}

size_t EmbeddingLookup::getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t input_count,
                                         DynamicPluginTensorDesc const*, int32_t) const noexcept {
  return input_count == 1 ? kLatchBytes : 0;
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
  return answer(kMethod, read(params, inputs, outputs));
}

int32_t EmbeddingLookup::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const* output_descs,
                                 void const* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
  constexpr char kMethod[] = "enqueue";
  EmbeddingParams params;
  if (char const* const fault = read(params, input_descs, output_descs)) return answer(kMethod, fault);
  if (by_name() && !table_ && !building()) return answer(kMethod, "the plugin was never attached to a context");
  EmbeddingColumns& columns = params.columns[0];
  params.out = outputs[0];
  columns.ids = inputs[0];
  if (attributes_.status) columns.status = outputs[1];
  if (!by_name()) columns.table.hot = inputs[1];
  if (table_) {
    params.live_tables = table_->live_tables();
    columns.live_table = table_->place();
    if (table_->changes()) params.latch = static_cast<EmbeddingTable const**>(workspace);
  }
  char const* const sentence = embedding_unsupported(params);
  if (sentence) return answer(kMethod, sentence);
  cudaError_t const error = launch_embedding_lookup(params, stream);
  return answer(kMethod, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}

// Everything but addresses.
char const* EmbeddingLookup::read(EmbeddingParams& params, PluginTensorDesc const* inputs,
                                  PluginTensorDesc const* outputs) const noexcept {
  params = {};
  Dims const &ids = inputs[0].dims, &out = outputs[0].dims;
  if (ids.nbDims != 1 || !is_length(ids.d[0])) return "ids must have one axis";
  if (!is_index(inputs[0].type)) return "ids must be INT32 or INT64";
  if (out.nbDims != 2 || out.d[0] != ids.d[0] || !is_length(out.d[1])) return "the output must be [ids, dim]";
  if (outputs[0].type != onnx_type(attributes_.output_type)) return "the output's type is not output_type";
  if (attributes_.status) {
    Dims const& status = outputs[1].dims;
    bool const fits = status.nbDims == 1 && status.d[0] == ids.d[0] && outputs[1].type == Type::kINT32;
    if (!fits) return "the status must be INT32 [ids]";
  }
  params.count = ids.d[0];
  params.out_stride = out.d[1];
  params.wide_ids = inputs[0].type == Type::kINT64;
  params.policy = static_cast<IdPolicy>(find_policy(attributes_.policy));
  params.has_padding = attributes_.has_padding;
  params.padding_id = attributes_.padding_id;
  params.wide_status = attributes_.status;
  convert(outputs[0].type, params.output_type);
  params.column_count = 1;
  EmbeddingColumns& columns = params.columns[0];
  columns.id_stride = columns.status_stride = 1;
  columns.dim = static_cast<int32_t>(out.d[1]);
  if (by_name()) {
    columns.type = table_ ? table_->type() : params.output_type;
    columns.table.default_row = kZeroRow;
    return columns.dim == attributes_.dim ? nullptr : "the output has not the table's width";
  }
  return read_table(columns, inputs[1]);
}

char const* EmbeddingLookup::read_table(EmbeddingColumns& columns, PluginTensorDesc const& input) const noexcept {
  Dims const& table = input.dims;
  if (table.nbDims != 2 || table.d[0] < 0 || table.d[1] != columns.dim) return "the table must be [rows, dim]";
  if (!is_table(input.type)) return "the table must be FP32, FP16 or BF16";
  convert(input.type, columns.type);
  columns.table.rows = columns.table.hot_rows = columns.table.direct_rows = table.d[0];
  columns.table.default_row = kZeroRow;
  return nullptr;
}

}  // namespace hstu_trt::trt
