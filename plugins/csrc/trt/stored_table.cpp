// SPDX-License-Identifier: Apache-2.0
#include "stored_table.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "json.h"

namespace hstu_trt::trt {
namespace {

namespace fs = std::filesystem;

std::string read_file(fs::path const& path) {
  std::ifstream stream(path, std::ios::binary);
  std::string const text((std::istreambuf_iterator<char>(stream)), {});
  if (!stream.is_open() || stream.bad()) throw std::runtime_error(path.string() + " cannot be read");
  return text;
}

// 64-bit FNV-1a. The manifest holds the sha256 of every shard.
std::string digest(std::string const& text) {
  uint64_t hash = 14695981039346656037ull;
  for (unsigned char const letter : text) hash = (hash ^ letter) * 1099511628211ull;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

DataType data_type(std::string const& name) {
  if (name == "float32") return DataType::kFloat32;
  if (name == "float16") return DataType::kFloat16;
  throw std::invalid_argument("rows are " + name + ", and must be float32 or float16");
}

fs::path inside(fs::path const& folder, std::string const& file) {
  fs::path const relative(file);
  bool leaves = relative.is_absolute();
  for (fs::path const& part : relative) leaves |= part == "..";
  if (leaves) throw std::invalid_argument("the manifest names a file outside its folder: " + file);
  return folder / relative;
}

StoredShard read_shard(fs::path const& folder, Json const& entry, StoredTable const& table, int64_t first_row) {
  StoredShard const shard{inside(folder, entry.at(0).text()).string(), entry.at(1).count(), entry.at(2).count(),
                          entry.at(3).count()};
  auto const expected = static_cast<uintmax_t>(shard.payload_offset + shard.rows * table.row_bytes());
  if (shard.first_row != first_row || fs::file_size(shard.path) != expected) {
    throw std::invalid_argument(shard.path + " is not what the manifest says");
  }
  return shard;
}

StoredTable read_table(fs::path const& folder, std::string const& name) {
  std::string const manifest = read_file(folder / "manifest.json");
  Json const document = Json::parse(manifest);
  if (document.at("kind").text() != "tables") throw std::invalid_argument("the manifest is not one of tables");
  Json const& entry = document.at("tables").at(name);
  StoredTable table{name, fs::canonical(folder).string(), digest(manifest), entry.at("rows").count(), 0, {}, {}};
  int64_t const dim = entry.at("dim").count();
  if (dim < 1 || dim > INT32_MAX || table.rows > INT64_MAX / (4 * dim)) throw std::invalid_argument("no valid size");
  table.dim = static_cast<int32_t>(dim);
  table.type = data_type(entry.at("dtype").text());
  int64_t rows = 0;
  for (Json const& shard : entry.at("shards").items()) {
    table.shards.push_back(read_shard(folder, shard, table, rows));
    rows += table.shards.back().rows;
  }
  if (rows != table.rows) throw std::invalid_argument("the shards do not add up to the table");
  return table;
}

}  // namespace

StoredTable find_stored_table(std::string const& name) {
  char const* const folder = std::getenv(kTablesVariable);
  std::string const what = "table '" + name + "'";
  if (!folder || !*folder) {
    throw std::runtime_error(what + " is looked up by its name: set " + kTablesVariable + " to the tables' folder");
  }
  try {
    return read_table(folder, name);
  } catch (std::exception const& error) {
    throw std::runtime_error(what + " in " + kTablesVariable + "=" + folder + ": " + error.what());
  }
}

}  // namespace hstu_trt::trt
