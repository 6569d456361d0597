// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "../capi/capi.h"
#include "contract.h"
#include "contract_common.h"
#include "expressions.h"

namespace hstu_trt::host {
namespace {

constexpr int64_t kUsers = 4, kQueries = 300, kKeys = 700, kHeads = 4, kDim = 64;
constexpr int32_t kOnnxFloat32 = 1, kOnnxFloat16 = 10, kOnnxBFloat16 = 16;

// Inputs of the op; `count` of them: 7, 10 with scales, 11 with attn_scale, 15 with the bias.
std::vector<PluginTensorDesc> inputs(Type tokens, size_t count = 7, Type offsets = Type::kINT32) {
  std::vector<PluginTensorDesc> all = {
      tensor({kQueries, kHeads, kDim}, tokens),
      tensor({kKeys, kHeads, kDim}, tokens),
      tensor({kKeys, kHeads, kDim}, tokens),
      tensor({kUsers + 1}, offsets),
      tensor({kUsers + 1}, offsets),
      tensor({kUsers + 1}, offsets),
      tensor({1}, Type::kFLOAT),
      tensor({1}, Type::kFLOAT),
      tensor({1}, Type::kFLOAT),
      tensor({1}, Type::kFLOAT),
      tensor({kQueries}, Type::kFLOAT),
      tensor({19}, Type::kFLOAT),
      tensor({33}, Type::kFLOAT),
      tensor({kQueries}, Type::kINT64),
      tensor({kKeys}, Type::kINT64),
  };
  all.resize(count);
  return all;
}

// Without the inputs at [begin, end): those behind move up.
std::vector<PluginTensorDesc> without(std::vector<PluginTensorDesc> list, int begin, int end) {
  list.erase(list.begin() + begin, list.begin() + end);
  return list;
}

// With empty inputs at [begin, end): tensors without axes.
std::vector<PluginTensorDesc> emptied(std::vector<PluginTensorDesc> list, int begin, int end) {
  for (int i = begin; i < end; ++i) list[static_cast<size_t>(i)].dims.nbDims = -1;
  return list;
}

PluginTensorDesc output(Type type) { return tensor({kQueries, kHeads, kDim}, type); }

// Whether the builder's questions about every tensor are answered with yes, in its order.
bool supports(PluginHandle const& plugin, std::vector<PluginTensorDesc> const& ins, PluginTensorDesc const& out) {
  std::vector<DynamicPluginTensorDesc> all = dynamic(ins);
  all.push_back(dynamic(out));
  auto const count = static_cast<int32_t>(ins.size());
  for (int32_t position = 0; position <= count; ++position) {
    if (!plugin.build().supportsFormatCombination(position, all.data(), count, 1)) return false;
  }
  return true;
}

bool configures(PluginHandle const& plugin, std::vector<PluginTensorDesc> const& ins, PluginTensorDesc const& out) {
  std::vector<DynamicPluginTensorDesc> const all = dynamic(ins);
  DynamicPluginTensorDesc const result = dynamic(out);
  return plugin.build().configurePlugin(all.data(), static_cast<int32_t>(all.size()), &result, 1) == 0;
}

struct Combination {
  char const* name;
  int32_t output_type;
  std::vector<PluginTensorDesc> inputs;
  PluginTensorDesc output;
  bool supported;
};

std::vector<Combination> combinations() {
  PluginTensorDesc const half = output(Type::kHALF);
  auto const fp16 = inputs(Type::kHALF), all = inputs(Type::kHALF, 15), fp8 = inputs(Type::kFP8, 15);
  auto mixed = fp16, channels = fp16, wide = fp16, short_offsets = fp16, norm = fp16;
  mixed[1].type = Type::kBF16;
  channels[0].format = nvinfer1::TensorFormat::kHWC;
  wide[4].type = Type::kINT64;
  short_offsets[4].type = Type::kBOOL;
  norm[6].type = Type::kHALF;
  return {
      {"fp16", kOnnxFloat16, fp16, half, true},
      {"bf16", kOnnxBFloat16, inputs(Type::kBF16), output(Type::kBF16), true},
      {"fp32", kOnnxFloat32, inputs(Type::kFLOAT), output(Type::kFLOAT), true},
      {"fp16 to fp32", kOnnxFloat32, fp16, output(Type::kFLOAT), true},
      {"fp8 with scales", kOnnxFloat16, inputs(Type::kFP8, 10), half, true},
      {"fp8 with scales and attn_scale", kOnnxFloat16, inputs(Type::kFP8, 11), half, true},
      {"INT64 offsets", kOnnxFloat16, inputs(Type::kHALF, 7, Type::kINT64), half, true},
      {"INT32 and INT64 offsets", kOnnxFloat16, wide, half, true},
      {"attn_scale behind empty scales", kOnnxFloat16, emptied(inputs(Type::kHALF, 11), 7, 10), half, true},
      {"attn_scale moved up", kOnnxFloat16, without(inputs(Type::kHALF, 11), 7, 10), half, true},
      {"bias behind empty inputs", kOnnxFloat16, emptied(all, 7, 11), half, true},
      {"bias moved up", kOnnxFloat16, without(all, 7, 11), half, true},
      {"attn_scale and bias moved up", kOnnxFloat16, without(all, 7, 10), half, true},
      {"fp8 with scales, bias moved up", kOnnxFloat16, without(fp8, 10, 11), half, true},
      {"everything", kOnnxFloat16, fp8, half, true},
      {"output of another type", kOnnxFloat16, fp16, output(Type::kFLOAT), false},
      {"k of another type", kOnnxFloat16, mixed, half, false},
      {"INT8 tokens", kOnnxFloat16, inputs(Type::kINT8), half, false},
      {"BOOL offsets", kOnnxFloat16, short_offsets, half, false},
      {"fp16 norm", kOnnxFloat16, norm, half, false},
      {"another format", kOnnxFloat16, channels, half, false},
      {"nine inputs", kOnnxFloat16, inputs(Type::kHALF, 9), half, false},
      {"six inputs", kOnnxFloat16, inputs(Type::kHALF, 6), half, false},
  };
}

void check_types(Checks& checks, Creators const& creators) {
  for (Combination const& one : combinations()) {
    PluginHandle const plugin = create(*creators.attention, Fields().add("output_type", one.output_type));
    take_log();
    bool const supported = supports(plugin, one.inputs, one.output);
    checks.check(supported == one.supported && (supported || said(creators, "supportsFormatCombination: ")),
                 std::string("attention types: ") + one.name);
    if (one.supported) checks.check(configures(plugin, one.inputs, one.output), std::string("configured: ") + one.name);
  }
  PluginHandle const plugin = create(*creators.attention, Fields().add("output_type", kOnnxBFloat16));
  std::vector<Type> types(7, Type::kHALF);
  types[3] = types[4] = types[5] = Type::kINT32;
  types[6] = Type::kFLOAT;
  Type result = Type::kBOOL;
  checks.check(plugin.build().getOutputDataTypes(&result, 1, types.data(), 7) == 0 && result == Type::kBF16,
               "the output's type is output_type");
  types[2] = Type::kINT8;
  take_log();
  checks.check(
      plugin.build().getOutputDataTypes(&result, 1, types.data(), 7) != 0 && said(creators, "v must have the type"),
      "types that do not go together are refused in words");
}

void check_shapes(Checks& checks, Creators const& creators) {
  PluginHandle const plugin = create(*creators.attention, Fields());
  Expressions expressions;
  std::vector<nvinfer1::DimsExprs> ins = {expressions.dims({kQueries, kHeads, 48}),
                                          expressions.dims({kKeys, kHeads, 48}), expressions.dims({kKeys, kHeads, 40})};
  for (int i = 0; i < 4; ++i) ins.push_back(expressions.dims({kUsers + 1}));
  nvinfer1::DimsExprs out{};
  int32_t const code = plugin.build().getOutputShapes(ins.data(), 7, nullptr, 0, &out, 1, expressions.builder());
  checks.check(
      code == 0 && out.nbDims == 3 && value(out.d[0]) == kQueries && value(out.d[1]) == kHeads && value(out.d[2]) == 40,
      "the output has the tokens of q and the dim of v");
  ins[0].nbDims = 2;
  take_log();
  checks.check(plugin.build().getOutputShapes(ins.data(), 7, nullptr, 0, &out, 1, expressions.builder()) != 0 &&
                   said(creators, "three axes"),
               "q of two axes is refused in words");
}

// A change to inputs that go together, and what must be said.
struct BadShape {
  size_t input;
  PluginTensorDesc tensor;
  char const* words;
};

void check_bad_shapes(Checks& checks, Creators const& creators) {
  PluginHandle const plugin = create(*creators.attention, Fields().add("output_type", kOnnxFloat16));
  PluginTensorDesc const out = output(Type::kHALF);
  std::vector<BadShape> const list = {
      {1, tensor({kKeys, kHeads, 32}, Type::kHALF), "same dim"},
      {1, tensor({kKeys - 1, kHeads, kDim}, Type::kHALF), "as many tokens"},
      {2, tensor({kKeys, kHeads + 1, kDim}, Type::kHALF), "as many heads"},
      {2, tensor({kKeys, kHeads, kDim + 8}, Type::kHALF), "the output must be"},
      {0, tensor({kQueries, kHeads * kDim}, Type::kHALF), "three axes"},
      {5, tensor({kUsers}, Type::kINT32), "as many values"},
      {3, tensor({kUsers + 1, 1}, Type::kINT32), "one axis"},
      {6, tensor({kUsers + 3}, Type::kFLOAT), "norm must have"},
      {6, tensor({1}, Type::kHALF), "norm must be FP32"},
  };
  for (BadShape const& one : list) {
    std::vector<PluginTensorDesc> ins = inputs(Type::kHALF);
    ins[one.input] = one.tensor;
    take_log();
    bool const refused = !configures(plugin, ins, out);
    checks.check(refused && said(creators, one.words), std::string("configurePlugin refuses: ") + one.words);
  }
  std::vector<PluginTensorDesc> ins = inputs(Type::kHALF);
  checks.check(plugin.runtime().onShapeChange(ins.data(), 7, &out, 1) == 0, "onShapeChange takes real shapes");
  ins[1].dims.d[0] = 5;
  take_log();
  checks.check(plugin.runtime().onShapeChange(ins.data(), 7, &out, 1) != 0 && said(creators, "as many tokens"),
               "onShapeChange refuses in words");
}

size_t workspace(PluginHandle const& plugin, std::vector<PluginTensorDesc> const& ins, PluginTensorDesc const& out) {
  std::vector<DynamicPluginTensorDesc> const all = dynamic(ins);
  DynamicPluginTensorDesc const result = dynamic(out);
  return plugin.build().getWorkspaceSize(all.data(), static_cast<int32_t>(all.size()), &result, 1);
}

// Bytes that the launcher wants for the same call, by the C face.
size_t launcher_workspace(DataType type, bool scales) {
  void* const address = reinterpret_cast<void*>(256);
  auto const* const number = static_cast<float const*>(address);
  auto const* const offsets = static_cast<int32_t const*>(address);
  TokenTensor const tokens{address, kHeads * kDim, kDim};
  AttentionParams params{};
  params.q = params.k = params.v = params.out = tokens;
  params.query_offsets = params.prefix_offsets = params.candidate_offsets = offsets;
  params.norm = number;
  if (scales) params.q_scale = params.k_scale = params.v_scale = number;
  params.scale_count = scales ? 1 : 0;
  params.norm_count = params.causal = params.candidate_group_size = 1;
  params.users = kUsers;
  params.heads = kHeads;
  params.qk_dim = params.v_dim = kDim;
  params.query_rows = kQueries;
  params.key_rows = kKeys;
  params.type = type;
  params.output_type = DataType::kFloat16;
  params.alpha = 1.f;
  return hstu_trt_attention_workspace_size(&params, 0);
}

void check_workspace(Checks& checks, Creators const& creators) {
  PluginHandle const plugin = create(*creators.attention, Fields().add("output_type", kOnnxFloat16));
  PluginTensorDesc const out = output(Type::kHALF);
  constexpr size_t kOffsets = 256;  // three copies of 5 INT32, and what aligns the rest
  checks.check(workspace(plugin, inputs(Type::kHALF), out) == kOffsets + launcher_workspace(DataType::kFloat16, false),
               "workspace is the launcher's for the largest shapes, fp16");
  checks.check(
      workspace(plugin, inputs(Type::kFP8, 10), out) == kOffsets + launcher_workspace(DataType::kFloat8E4M3, true),
      "workspace is the launcher's for the largest shapes, fp8");
}

std::vector<Refused> refused_fields() {
  static int32_t const number = 1;
  static double const wide = 1.;
  using Field = nvinfer1::PluginField;
  using Kind = nvinfer1::PluginFieldType;
  return {
      {"unknown", Fields().add("alhpa", 1.f), "'alhpa' is no attribute"},
      {"twice", Fields().add("causal", 1).add("causal", 0), "given twice"},
      {"alpha as an integer", Fields().add("alpha", 1), "'alpha' must be FLOAT32"},
      {"causal as a float", Fields().add("causal", 1.f), "'causal' must be INT32"},
      {"causal of 2", Fields().add("causal", 2), "causal must be 0 or 1"},
      {"two values", Fields().add_raw(Field("causal", &wide, Kind::kINT32, 2)), "must hold one value"},
      {"no data", Fields().add_raw(Field("causal", nullptr, Kind::kINT32, 1)), "has no data"},
      {"no name", Fields().add_raw(Field(nullptr, &number, Kind::kINT32, 1)), "has no name"},
      {"more than 32 bits", Fields().add("max_attn_len", int64_t{1} << 40), "does not fit"},
      {"negative window", Fields().add("max_attn_len", -1), "max_attn_len must not be negative"},
      {"negative context", Fields().add("contextual_seq_len", -1), "contextual_seq_len must not"},
      {"negative full part", Fields().add("min_full_attn_seq_len", -1), "min_full_attn_seq_len must not"},
      {"group of none", Fields().add("candidate_group_size", 0), "at least 1"},
      {"infinite alpha", Fields().add("alpha", std::numeric_limits<float>::infinity()), "finite"},
      {"output_type 7", Fields().add("output_type", 7), "output_type must be 1"},
  };
}

}  // namespace

void check_attention_contract(Checks& checks, Creators const& creators) {
  Fields const fields = Fields()
                            .add("alpha", .125f)
                            .add("causal", 1)
                            .add("candidate_group_size", int64_t{2})
                            .add("output_type", kOnnxFloat16);
  PluginHandle const plugin = create(*creators.attention, fields, TensorRTPhase::kBUILD);
  checks.check(static_cast<bool>(plugin), "attention is created from fields as ONNX names them");
  checks.check(configures(plugin, inputs(Type::kHALF), output(Type::kHALF)), "attention is configured");
  check_life(checks, *creators.attention, plugin);
  PluginHandle const other = create(*creators.attention, Fields().add("alpha", .25f));
  checks.check(std::string(other.build().getTimingCacheID()) != plugin.build().getTimingCacheID(),
               "other attributes have another timing cache id");
  PluginHandle const attached(plugin.runtime().attachToContext(nullptr));
  checks.check(attached && attached.operator->() != plugin.operator->(), "attachToContext returns a plugin of its own");
  check_types(checks, creators);
  check_shapes(checks, creators);
  check_bad_shapes(checks, creators);
  check_workspace(checks, creators);
  check_refused(checks, creators, *creators.attention, refused_fields());
}

}  // namespace hstu_trt::host
