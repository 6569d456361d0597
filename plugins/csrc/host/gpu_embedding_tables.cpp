// SPDX-License-Identifier: Apache-2.0
// Lookups by name in tables of all kinds, against rows that the host tier answered; and versions that are exchanged.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "device.h"
#include "gpu.h"
#include "handles.h"

namespace hstu_trt::host {
namespace {

// A line of cases.txt, in this order. Files are relative to the folder.
struct StoredCase {
  std::string tables, table, hot_rows, policy;
  int has_padding = 0, padding_id = 0, wide_ids = 0, output_type = 0;
  int64_t count = 0, dim = 0;
  std::string ids, rows, status;

  friend std::istream& operator>>(std::istream& in, StoredCase& one) {
    return in >> one.tables >> one.table >> one.hot_rows >> one.policy >> one.has_padding >> one.padding_id >>
           one.wide_ids >> one.output_type >> one.count >> one.dim >> one.ids >> one.rows >> one.status;
  }
};

std::vector<char> read_bytes(std::string const& path) {
  std::ifstream stream(path, std::ios::binary);
  must(stream.is_open(), ("there is no " + path).c_str());
  return {std::istreambuf_iterator<char>(stream), {}};
}

bool check_case(Creators const& creators, std::string const& folder, StoredCase const& one) {
  setenv("HSTU_TRT_TABLES", (folder + "/" + one.tables).c_str(), 1);
  setenv("HSTU_TRT_TABLES_HOT_ROWS", one.hot_rows == "all" ? "" : (one.table + "=" + one.hot_rows).c_str(), 1);
  Fields const fields = Fields()
                            .add("table_name", one.table)
                            .add("output_type", one.output_type)
                            .add("policy", one.policy)
                            .add("has_padding", one.has_padding)
                            .add("padding_id", one.padding_id)
                            .add("status", 1)
                            .add("dim", static_cast<int32_t>(one.dim));
  PluginHandle const engine = create(*creators.embedding, fields);
  if (!engine) return false;
  PluginHandle const plugin(engine.runtime().attachToContext(nullptr));
  if (!plugin) return false;
  Type const type = one.output_type == 10 ? Type::kHALF : Type::kFLOAT;
  PluginTensorDesc const in = tensor({one.count}, one.wide_ids ? Type::kINT64 : Type::kINT32);
  PluginTensorDesc const out[] = {tensor({one.count, one.dim}, type), tensor({one.count}, Type::kINT32)};
  if (plugin.runtime().onShapeChange(&in, 1, out, 2) != 0) return false;
  Buffer const ids(read_bytes(folder + "/" + one.ids)), workspace(256);
  Buffer const rows(static_cast<size_t>(one.count * one.dim) * element_bytes(type));
  Buffer const status(static_cast<size_t>(one.count) * sizeof(int32_t));
  void const* const address = ids.data();
  void* const outputs[] = {rows.data(), status.data()};
  Stream const stream;
  if (plugin.runtime().enqueue(&in, out, &address, outputs, workspace.data(), stream) != 0) return false;
  stream.wait();
  std::vector<char> const expected = read_bytes(folder + "/" + one.status);
  std::vector<int32_t> const found = status.read<int32_t>();
  bool same = expected.size() == found.size() && rows.read<char>() == read_bytes(folder + "/" + one.rows);
  for (size_t i = 0; same && i < found.size(); ++i) same = found[i] == expected[i];
  return same;
}

void put_in_use(std::string const& folder, char const* version) {
  std::string const part = folder + "/.CURRENT.part";
  std::ofstream(part) << version << "\n";
  must(std::rename(part.c_str(), (folder + "/CURRENT").c_str()) == 0, "CURRENT cannot be replaced");
}

}  // namespace

void run_stored_cases(Checks& checks, Creators const& creators, char const* folder) {
  std::ifstream list(std::string(folder) + "/cases.txt");
  must(list.is_open(), "there is no cases.txt");
  StoredCase one;
  int count = 0, same = 0;
  while (list >> one) {
    take_log();
    bool const good = check_case(creators, folder, one);
    count += 1;
    same += good;
    if (!good) {
      checks.check(
          false,
          "rows of the host tier: " + one.tables + ", " + one.table + ", hot " + one.hot_rows + ", " + one.policy,
          take_log());
    }
  }
  unsetenv("HSTU_TRT_TABLES_HOT_ROWS");
  checks.check(count > 0 && same == count, "lookups by name have the bits and the status of the host tier",
               std::to_string(same) + " of " + std::to_string(count));
}

// Versions v1 and v2 of a table item_id of width 8, whose values are 1 and 2; v1 is in use.
void run_versions(Checks& checks, Creators const& creators, char const* folder) {
  constexpr int64_t kCount = 20'000, kRows = 1000;
  setenv("HSTU_TRT_TABLES", folder, 1);
  setenv("HSTU_TRT_TABLES_POLL_S", "0.02", 1);
  {
    Fields const fields = Fields().add("table_name", std::string("item_id")).add("output_type", 1).add("dim", 8);
    PluginHandle const engine = create(*creators.embedding, fields);
    PluginHandle const plugin(engine.runtime().attachToContext(nullptr));
    must(static_cast<bool>(plugin), "attachToContext finds no table item_id");
    PluginTensorDesc const in = tensor({kCount}, Type::kINT64), out = tensor({kCount, 8}, Type::kFLOAT);
    must(plugin.runtime().onShapeChange(&in, 1, &out, 1) == 0, "onShapeChange refuses");
    std::vector<int64_t> ids(kCount);
    for (int64_t i = 0; i < kCount; ++i) ids[static_cast<size_t>(i)] = i % kRows;
    Buffer const id_buffer(ids), rows(kCount * 8 * sizeof(float)), workspace(256);
    void const* const address = id_buffer.data();
    void* const result = rows.data();
    Graph graph([&](cudaStream_t stream) {
      must(plugin.runtime().enqueue(&in, &out, &address, &result, workspace.data(), stream) == 0, "enqueue fails");
    });
    int mixed = 0, replays = 0;
    auto const value = [&] {
      graph.replay();
      replays += 1;
      std::vector<float> const found = rows.read<float>();
      for (float const one : found) mixed += one != found[0];
      return found[0];
    };
    auto const becomes = [&](float wanted) {
      auto const end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
      while (std::chrono::steady_clock::now() < end) {
        if (value() == wanted) return true;
      }
      return false;
    };
    checks.check(value() == 1.f, "versions: the one in use is served");
    for (int round = 0; round < 5; ++round) {
      put_in_use(folder, "v2");
      checks.check(becomes(2.f), "versions: a captured graph sees the next one");
      put_in_use(folder, "v1");
      checks.check(becomes(1.f), "versions: and the one before again");
    }
    put_in_use(folder, "damaged");
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    checks.check(value() == 1.f, "versions: a damaged one is not served");
    put_in_use(folder, "wide");
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    checks.check(value() == 1.f, "versions: one of another width is not served");
    checks.check(mixed == 0, "versions: no lookup sees two", std::to_string(replays) + " replays");
  }
  unsetenv("HSTU_TRT_TABLES_POLL_S");
}

}  // namespace hstu_trt::host
