// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>

#include "contract.h"
#include "contract_common.h"
#include "expressions.h"

namespace hstu_trt::host {
namespace {

constexpr int32_t kOnnxFloat32 = 1, kOnnxFloat16 = 10;

struct Combination {
  char const* name;
  int32_t output_type;
  std::vector<PluginTensorDesc> tensors;  // inputs, then the output
  bool supported;
};

std::vector<Combination> combinations() {
  auto const ids = [](Type type) { return tensor({9}, type); };
  auto const table = [](Type type) { return tensor({100, 8}, type); };
  auto const rows = [](Type type) { return tensor({9, 8}, type); };
  PluginTensorDesc blocked = rows(Type::kHALF);
  blocked.format = nvinfer1::TensorFormat::kCHW2;
  return {
      {"INT32, fp16", kOnnxFloat16, {ids(Type::kINT32), table(Type::kHALF), rows(Type::kHALF)}, true},
      {"INT64, fp16 to fp32", kOnnxFloat32, {ids(Type::kINT64), table(Type::kHALF), rows(Type::kFLOAT)}, true},
      {"INT64, bf16 to fp16", kOnnxFloat16, {ids(Type::kINT64), table(Type::kBF16), rows(Type::kHALF)}, true},
      {"INT32, fp32", kOnnxFloat32, {ids(Type::kINT32), table(Type::kFLOAT), rows(Type::kFLOAT)}, true},
      {"float ids", kOnnxFloat16, {ids(Type::kFLOAT), table(Type::kHALF), rows(Type::kHALF)}, false},
      {"INT8 table", kOnnxFloat16, {ids(Type::kINT32), table(Type::kINT8), rows(Type::kHALF)}, false},
      {"output of another type", kOnnxFloat16, {ids(Type::kINT32), table(Type::kHALF), rows(Type::kFLOAT)}, false},
      {"another format", kOnnxFloat16, {ids(Type::kINT32), table(Type::kHALF), blocked}, false},
  };
}

void check_types(Checks& checks, Creators const& creators) {
  for (Combination const& one : combinations()) {
    PluginHandle const plugin = create(*creators.embedding, Fields().add("output_type", one.output_type));
    std::vector<DynamicPluginTensorDesc> const all = dynamic(one.tensors);
    bool supported = true;
    for (int32_t position = 0; position < 3; ++position) {
      supported = supported && plugin.build().supportsFormatCombination(position, all.data(), 2, 1);
    }
    checks.check(supported == one.supported, std::string("embedding types: ") + one.name);
    if (!one.supported) continue;
    checks.check(plugin.build().configurePlugin(all.data(), 2, &all[2], 1) == 0,
                 std::string("configured: ") + one.name);
    checks.check(plugin.runtime().onShapeChange(one.tensors.data(), 2, &one.tensors[2], 1) == 0,
                 std::string("onShapeChange: ") + one.name);
  }
}

void check_shapes(Checks& checks, Creators const& creators) {
  PluginHandle const plugin = create(*creators.embedding, Fields());
  Expressions expressions;
  nvinfer1::DimsExprs ins[] = {expressions.dims({9}), expressions.dims({100, 8})};
  nvinfer1::DimsExprs out{};
  int32_t const code = plugin.build().getOutputShapes(ins, 2, nullptr, 0, &out, 1, expressions.builder());
  checks.check(code == 0 && out.nbDims == 2 && value(out.d[0]) == 9 && value(out.d[1]) == 8, "a row for each id");
  Type const types[] = {Type::kFLOAT, Type::kHALF};
  Type result;
  take_log();
  checks.check(plugin.build().getOutputDataTypes(&result, 1, types, 2) != 0 && said(creators, "ids must be"),
               "float ids are refused in words");
  PluginTensorDesc const narrow[] = {tensor({9}, Type::kINT32), tensor({100, 7}, Type::kHALF)};
  PluginTensorDesc const rows = tensor({9, 8}, Type::kFLOAT);
  take_log();
  checks.check(plugin.runtime().onShapeChange(narrow, 2, &rows, 1) != 0 && said(creators, "[rows, dim]"),
               "a table of another width is refused in words");
}

// The second output: where each row came from.
void check_status(Checks& checks, Creators const& creators) {
  PluginHandle const plugin = create(*creators.embedding, Fields().add("status", 1).add("output_type", kOnnxFloat16));
  Expressions expressions;
  nvinfer1::DimsExprs ins[] = {expressions.dims({9}), expressions.dims({100, 8})};
  nvinfer1::DimsExprs outs[2] = {};
  checks.check(plugin.build().getNbOutputs() == 2 &&
                   plugin.build().getOutputShapes(ins, 2, nullptr, 0, outs, 2, expressions.builder()) == 0 &&
                   outs[1].nbDims == 1 && value(outs[1].d[0]) == 9,
               "status: a second output, one per id");
  Type const types[] = {Type::kINT64, Type::kHALF};
  Type results[2];
  checks.check(plugin.build().getOutputDataTypes(results, 2, types, 2) == 0 && results[1] == Type::kINT32,
               "status: INT32");
  PluginTensorDesc const in[] = {tensor({9}, Type::kINT64), tensor({100, 8}, Type::kHALF)};
  PluginTensorDesc const out[] = {tensor({9, 8}, Type::kHALF), tensor({9}, Type::kINT32)};
  PluginTensorDesc const wrong[] = {out[0], tensor({8}, Type::kINT32)};
  checks.check(plugin.runtime().onShapeChange(in, 2, out, 2) == 0, "status: shapes are taken");
  take_log();
  checks.check(plugin.runtime().onShapeChange(in, 2, wrong, 2) != 0 && said(creators, "the status must be INT32 [ids]"),
               "status: a shape of another length is refused in words");
  checks.check(plugin.runtime().onShapeChange(in, 2, out, 1) != 0, "status: one output is refused");
  std::vector<DynamicPluginTensorDesc> const all = dynamic(std::vector<PluginTensorDesc>{in[0], in[1], out[0], out[1]});
  bool supported = true;
  for (int32_t at = 0; at < 4; ++at) supported &= plugin.build().supportsFormatCombination(at, all.data(), 2, 2);
  checks.check(supported && !plugin.build().supportsFormatCombination(4, all.data(), 2, 2), "status: types are taken");
}

// One input: the table comes from the folder HSTU_TRT_TABLES.
void check_by_name(Checks& checks, Creators const& creators, char const* tables) {
  Expressions expressions;
  nvinfer1::DimsExprs const ids = expressions.dims({9});
  nvinfer1::DimsExprs out{};
  auto const shapes = [&](PluginHandle const& plugin) {
    take_log();
    return plugin.build().getOutputShapes(&ids, 1, nullptr, 0, &out, 1, expressions.builder()) == 0;
  };
  PluginHandle const plugin = create(*creators.embedding, Fields().add("table_name", std::string("item_id")));
  unsetenv("HSTU_TRT_TABLES");
  checks.check(!shapes(plugin) && said(creators, "set HSTU_TRT_TABLES"), "no folder of tables is said in words");
  if (!tables) return;
  setenv("HSTU_TRT_TABLES", tables, 1);
  PluginHandle const unknown = create(*creators.embedding, Fields().add("table_name", std::string("nobody")));
  checks.check(!shapes(unknown) && said(creators, "there is no 'nobody'"), "an unknown table is said in words");
  checks.check(shapes(plugin) && value(out.d[0]) == 9 && value(out.d[1]) == 8,
               "the table's width comes from its folder");
  DynamicPluginTensorDesc const in = dynamic(tensor({9}, Type::kINT64)), rows = dynamic(tensor({9, 8}, Type::kFLOAT));
  checks.check(plugin.build().configurePlugin(&in, 1, &rows, 1) == 0, "a table by its name is configured");
  checks.check(plugin.build().getWorkspaceSize(&in, 1, &rows, 1) >= sizeof(void*), "a table by its name has a latch");
  nvinfer1::PluginFieldCollection const* const written = plugin.runtime().getFieldsToSerialize();
  PluginHandle const again(creators.embedding->createPlugin("layer", written, TensorRTPhase::kRUNTIME));
  unsetenv("HSTU_TRT_TABLES");
  take_log();
  checks.check(!PluginHandle(again.runtime().attachToContext(nullptr)) && said(creators, "set HSTU_TRT_TABLES"),
               "a context without its table is refused in words");
  Fields const wide = Fields().add("table_name", std::string("item_id")).add("dim", 9);
  setenv("HSTU_TRT_TABLES", tables, 1);
  take_log();
  PluginHandle const other = create(*creators.embedding, wide);
  checks.check(!PluginHandle(other.runtime().attachToContext(nullptr)),
               "a table that is not there or not as wide is refused");
}

}  // namespace

void check_embedding_contract(Checks& checks, Creators const& creators, char const* tables) {
  Fields const fields = Fields().add("table_name", std::string("item_id")).add("output_type", kOnnxFloat16);
  PluginHandle const plugin = create(*creators.embedding, fields, TensorRTPhase::kBUILD);
  checks.check(static_cast<bool>(plugin), "embedding is created from fields as ONNX names them");
  check_life(checks, *creators.embedding, plugin);
  PluginHandle const attached(plugin.runtime().attachToContext(nullptr));
  checks.check(static_cast<bool>(attached), "a context of an engine that is being built needs no table");
  check_types(checks, creators);
  check_shapes(checks, creators);
  check_status(checks, creators);
  check_by_name(checks, creators, tables);
  static char const unended[] = {'i', 't'};
  PluginHandle const cut =
      create(*creators.embedding, Fields().add_raw({"table_name", unended, nvinfer1::PluginFieldType::kCHAR, 2}));
  checks.check(cut && std::string(cut.build().getMetadataString()).find("table_name=it,") == 0,
               "a name may come without its zero");
  check_refused(checks, creators, *creators.embedding,
                {
                    {"table_name as a number", Fields().add("table_name", 1), "'table_name' must be CHAR"},
                    {"output_type 16", Fields().add("output_type", 16), "output_type must be 1"},
                    {"unknown policy", Fields().add("policy", std::string("guess")), "policy must be reject, zero"},
                    {"status 2", Fields().add("status", 2), "has_padding and status must be 0 or 1"},
                    {"negative width", Fields().add("dim", -1), "dim must not be negative"},
                    {"width without a name", Fields().add("dim", 8), "table_name must name"},
                    {"path", Fields().add("table_path", std::string("/tmp")), "'table_path' is no attribute"},
                });
}

}  // namespace hstu_trt::host
