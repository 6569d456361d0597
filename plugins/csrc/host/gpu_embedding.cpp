// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <thread>

#include "device.h"
#include "gpu.h"
#include "handles.h"

namespace hstu_trt::host {
namespace {

constexpr int64_t kRows = 1000;

struct LookupCase {
  Type ids, table, output;
  int64_t dim, count;

  std::string name() const {
    auto const text = [](Type type) {
      return type == Type::kHALF    ? "fp16"
             : type == Type::kBF16  ? "bf16"
             : type == Type::kINT64 ? "INT64"
             : type == Type::kINT32 ? "INT32"
                                    : "fp32";
    };
    return std::string("lookup ") + text(ids) + ", " + text(table) + " to " + text(output) + ", dim " +
           std::to_string(dim) + ", " + std::to_string(count) + " ids";
  }
};

std::vector<int64_t> some_ids(int64_t count, unsigned seed, int64_t rows = kRows) {
  std::mt19937_64 generator(seed);
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = static_cast<int64_t>(generator() % static_cast<uint64_t>(rows));
  // Not in the table: before it, right behind it, far away.
  constexpr int64_t kOutside[] = {-1, INT32_MIN, INT32_MAX};
  for (size_t i = 3; i < ids.size(); i += 7) ids[i] = i % 2 ? rows : kOutside[i / 7 % 3];
  return ids;
}

void write_ids(Buffer& buffer, std::vector<int64_t> const& ids, Type type) {
  if (type == Type::kINT64) {
    buffer.write(ids);
  } else {
    buffer.write(std::vector<int32_t>(ids.begin(), ids.end()));
  }
}

std::vector<float> expected(std::vector<int64_t> const& ids, std::vector<float> const& table, int64_t rows,
                            int64_t dim) {
  std::vector<float> result;
  for (int64_t const id : ids) {
    for (int64_t column = 0; column < dim; ++column) {
      result.push_back(id >= 0 && id < rows ? table[static_cast<size_t>(id * dim + column)] : 0.f);
    }
  }
  return result;
}

Fields fields_for(Type output) { return Fields().add("output_type", output == Type::kHALF ? 10 : 1); }

void check_lookup(Checks& checks, Creators const& creators, LookupCase const& one) {
  PluginHandle const engine = create(*creators.embedding, fields_for(one.output));
  PluginHandle const plugin(engine.runtime().attachToContext(nullptr));
  std::vector<int64_t> ids = some_ids(one.count, 3);
  // Small integers: every type holds them.
  std::vector<float> table(static_cast<size_t>(kRows * one.dim));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i % 251) - 125.f;
  Buffer id_buffer(ids.size() * element_bytes(one.ids));
  write_ids(id_buffer, ids, one.ids);
  Buffer const rows = upload(table, one.table);
  Buffer const out(static_cast<size_t>(one.count * one.dim) * element_bytes(one.output));
  PluginTensorDesc const inputs[] = {tensor({one.count}, one.ids), tensor({kRows, one.dim}, one.table)};
  PluginTensorDesc const output = tensor({one.count, one.dim}, one.output);
  must(plugin.runtime().onShapeChange(inputs, 2, &output, 1) == 0, "onShapeChange refuses");
  void const* const addresses[] = {id_buffer.data(), rows.data()};
  void* const result = out.data();
  auto const enqueue = [&](cudaStream_t stream) {
    must(plugin.runtime().enqueue(inputs, &output, addresses, &result, nullptr, stream) == 0, "enqueue fails");
  };
  Stream const stream;
  enqueue(stream);
  stream.wait();
  bool good = download(out, one.output) == expected(ids, table, kRows, one.dim);
  Graph graph(enqueue);
  ids = some_ids(one.count, 4);
  write_ids(id_buffer, ids, one.ids);
  graph.replay();
  good = good && download(out, one.output) == expected(ids, table, kRows, one.dim);
  checks.check(good, one.name() + ", captured and replayed with others");
}

// Lookups in a table of the folder, by its name: row * 8 + column.
class NamedLookup {
 public:
  NamedLookup(Creators const& creators, int64_t count)
      : inputs_(tensor({count}, Type::kINT64)),
        output_(tensor({count, 8}, Type::kFLOAT)),
        out_(static_cast<size_t>(count * 8) * sizeof(float)) {
    Fields const fields = Fields().add("table_name", std::string("item_id")).add("output_type", 1).add("dim", 8);
    PluginHandle const engine = create(*creators.embedding, fields);
    plugin_ = PluginHandle(engine.runtime().attachToContext(nullptr));
    must(static_cast<bool>(plugin_), "attachToContext finds no table item_id");
    must(plugin_.runtime().onShapeChange(&inputs_, 1, &output_, 1) == 0, "onShapeChange refuses");
  }

  bool right(int64_t rows, unsigned seed) {
    std::vector<int64_t> const ids = some_ids(inputs_.dims.d[0], seed, rows);
    Buffer const buffer(ids);
    void const* const address = buffer.data();
    void* const out = out_.data();
    Stream const stream;
    if (plugin_.runtime().enqueue(&inputs_, &output_, &address, &out, nullptr, stream) != 0) return false;
    stream.wait();
    std::vector<float> const result = out_.read<float>();
    for (size_t i = 0; i < result.size(); ++i) {
      int64_t const id = ids[i / 8];
      float const value = id >= 0 && id < rows ? static_cast<float>(id * 8 + static_cast<int64_t>(i % 8)) : 0.f;
      if (result[i] != value) return false;
    }
    return true;
  }

 private:
  PluginTensorDesc inputs_, output_;
  Buffer out_;
  PluginHandle plugin_;
};

size_t free_memory() {
  size_t available = 0, total = 0;
  must(cudaMemGetInfo(&available, &total));
  return available;
}

void check_named(Checks& checks, Creators const& creators, char const* tables) {
  constexpr int64_t kTableRows = 1'000'000;  // 32 MB: its memory can be seen
  constexpr size_t kTableBytes = kTableRows * 8 * sizeof(float);
  setenv("HSTU_TRT_TABLES", tables, 1);
  size_t const before = free_memory();
  {
    NamedLookup first(creators, 999), second(creators, 64);
    size_t const taken = before - free_memory();
    checks.check(first.right(kTableRows, 1) && second.right(kTableRows, 2), "lookup by name: the table's rows");
    checks.check(taken >= kTableBytes && taken < 2 * kTableBytes, "two contexts share one table",
                 std::to_string(taken >> 20) + " MiB");
    if (creators.stand_in)
      checks.check(stand_in_resources() == 1 && stand_in_clones() == 1, "one resource, loaded once");
    std::vector<int> good(4, 0);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < good.size(); ++i) {
      threads.emplace_back(
          [&, i] { good[i] = NamedLookup(creators, 500).right(kTableRows, static_cast<unsigned>(i)); });
    }
    for (std::thread& thread : threads) thread.join();
    checks.check(good == std::vector<int>(4, 1), "lookup by name: contexts made in 4 threads");
  }
  checks.check(free_memory() + kTableBytes / 2 > before, "the last context frees the table");
  if (creators.stand_in) checks.check(stand_in_resources() == 0, "no resource is left");
}

}  // namespace

void run_embedding(Checks& checks, Creators const& creators, char const* tables) {
  for (Type const ids : {Type::kINT32, Type::kINT64}) {
    for (Type const table : {Type::kHALF, Type::kFLOAT, Type::kBF16}) {
      for (Type const output : {Type::kHALF, Type::kFLOAT}) {
        for (int64_t const dim : {int64_t{1}, int64_t{7}, int64_t{32}, int64_t{33}, int64_t{512}}) {
          check_lookup(checks, creators, {ids, table, output, dim, 1003});
        }
      }
    }
  }
  for (int64_t const count : {int64_t{0}, int64_t{1}, int64_t{100'000}}) {
    check_lookup(checks, creators, {Type::kINT32, Type::kHALF, Type::kHALF, 64, count});
  }
  if (tables) check_named(checks, creators, tables);
}

}  // namespace hstu_trt::host
