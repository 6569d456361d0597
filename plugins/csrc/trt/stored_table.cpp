// SPDX-License-Identifier: Apache-2.0
#include "stored_table.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "json.h"

namespace hstu_trt::trt {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kAlignment = 4096;  // of tensors in shards
constexpr uint64_t kLongestHeader = 1 << 20;
constexpr char kPermutationTensor[] = "row_of_id";

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

// The folder of the version in use, as contract/table_versions.py finds it.
fs::path current_folder(fs::path const& root) {
  if (fs::exists(root / "manifest.json") || !fs::exists(root / "CURRENT")) return root;
  std::string name = read_file(root / "CURRENT");
  if (!name.empty() && name.back() == '\n') name.pop_back();
  bool const plain = !name.empty() && name.size() < 256 && name.find('/') == std::string::npos && name[0] != '.';
  if (!plain || !fs::is_directory(root / name)) throw std::invalid_argument("CURRENT names no version beside it");
  return root / name;
}

DataType data_type(std::string const& name) {
  if (name == "float32") return DataType::kFloat32;
  if (name == "float16") return DataType::kFloat16;
  if (name == "int8") return DataType::kInt8;
  if (name == "float8_e4m3fn") return DataType::kFloat8E4M3;
  throw std::invalid_argument("rows are " + name + ", and must be float32, float16, int8 or float8_e4m3fn");
}

// Which quantiser rows of a type are of; empty: none.
std::string quantiser_of(DataType type) {
  return type == DataType::kInt8 ? "int8_sym_row" : type == DataType::kFloat8E4M3 ? "e4m3_row" : "";
}

fs::path inside(fs::path const& folder, std::string const& file) {
  fs::path const relative(file);
  bool leaves = relative.is_absolute();
  for (fs::path const& part : relative) leaves |= part == "..";
  if (leaves) throw std::invalid_argument("the manifest names a file outside its folder: " + file);
  return folder / relative;
}

StoredShard read_shard(fs::path const& folder, Json const& entry, StoredTable const& table, int64_t first_row) {
  StoredShard shard{inside(folder, entry.at(0).text()).string(), entry.at(1).count(), entry.at(2).count(),
                    entry.at(3).count(), 0};
  if (shard.rows > table.rows) throw std::invalid_argument("the shards do not add up to the table");
  int64_t end = shard.payload_offset + shard.rows * table.row_bytes();
  if (table.is_quantised()) {
    shard.scale_offset =
        shard.payload_offset + (shard.rows * table.row_bytes() + kAlignment - 1) / kAlignment * kAlignment;
    end = shard.scale_offset + shard.rows * 4;
  }
  if (shard.first_row != first_row || fs::file_size(shard.path) != static_cast<uintmax_t>(end)) {
    throw std::invalid_argument(shard.path + " is not what the manifest says");
  }
  return shard;
}

// Where the permutation begins in its safetensors file.
int64_t permutation_offset(std::string const& path, int64_t ids) {
  std::ifstream stream(path, std::ios::binary);
  uint64_t length = 0;
  stream.read(reinterpret_cast<char*>(&length), sizeof(length));
  if (!stream || length > kLongestHeader) throw std::invalid_argument(path + " is no file of a permutation");
  std::string header(length, '\0');
  stream.read(header.data(), static_cast<std::streamsize>(length));
  if (!stream) throw std::invalid_argument(path + " is cut short");
  Json const document = Json::parse(header);
  Json const& tensor = document.at(kPermutationTensor);
  int64_t const begin = tensor.at("data_offsets").at(0).count(), end = tensor.at("data_offsets").at(1).count();
  int64_t const offset = static_cast<int64_t>(sizeof(length) + length) + begin;
  bool const fits = tensor.at("dtype").text() == "U32" && tensor.at("shape").items().size() == 1 &&
                    tensor.at("shape").at(0).count() == ids && end - begin == 4 * ids && offset % 4 == 0 &&
                    fs::file_size(path) >= static_cast<uintmax_t>(offset + 4 * ids);
  if (!fits) throw std::invalid_argument(path + " does not permute the table's ids");
  return offset;
}

StoredIdRule read_ids(fs::path const& folder, Json const& entry, int64_t rows) {
  StoredIdRule ids;
  if (Json const* const row = entry.find("default_row")) {
    ids.default_row = row->count();
    if (ids.default_row >= rows) throw std::invalid_argument("the default row is none of the table's");
  }
  Json const* const hash = entry.find("hash");
  if (!hash) return ids;
  std::string const kind = hash->at("kind").text();
  if (kind == "splitmix64") {
    ids.hash = IdHash::kSplitmix64;
    ids.seed = hash->at("seed").whole();
  } else if (kind == "permutation") {
    ids.hash = IdHash::kPermutation;
    ids.permutation = inside(folder, hash->at("file").text()).string();
    ids.permutation_offset = permutation_offset(ids.permutation, rows);
  } else if (kind != "none") {
    throw std::invalid_argument("ids are hashed by '" + kind + "', which is unknown here");
  }
  return ids;
}

// An option that was passed over might mean other rows.
void refuse_unknown(Json const& entry) {
  constexpr char const* kKnown[] = {"rows",      "dim",  "dtype",       "features", "shards",
                                    "quantiser", "hash", "default_row", "row_order"};
  for (auto const& [key, value] : entry.entries()) {
    bool known = false;
    for (char const* const one : kKnown) known |= key == one;
    if (!known) throw std::invalid_argument("the table has an option that is unknown here: '" + key + "'");
  }
}

StoredTable read_table(fs::path const& folder, std::string const& name) {
  std::string const manifest = read_file(folder / "manifest.json");
  Json const document = Json::parse(manifest);
  if (document.at("kind").text() != "tables") throw std::invalid_argument("the manifest is not one of tables");
  Json const& entry = document.at("tables").at(name);
  refuse_unknown(entry);
  StoredTable table;
  table.name = name;
  table.folder = fs::canonical(folder).string();
  table.version = digest(manifest);
  table.rows = entry.at("rows").count();
  int64_t const dim = entry.at("dim").count();
  if (dim < 1 || dim > INT32_MAX || table.rows > INT64_MAX / (8 * dim)) throw std::invalid_argument("no valid size");
  table.dim = static_cast<int32_t>(dim);
  table.type = data_type(entry.at("dtype").text());
  Json const* const quantiser = entry.find("quantiser");
  if ((quantiser ? quantiser->text() : "") != quantiser_of(table.type)) {
    throw std::invalid_argument("the rows' quantiser is unknown here");
  }
  int64_t rows = 0;
  for (Json const& shard : entry.at("shards").items()) {
    table.shards.push_back(read_shard(folder, shard, table, rows));
    rows += table.shards.back().rows;
  }
  if (rows != table.rows) throw std::invalid_argument("the shards do not add up to the table");
  table.ids = read_ids(folder, entry, table.rows);
  return table;
}

template <class Read>
auto said_of(std::string const& what, std::string const& root, Read&& read) {
  try {
    return read();
  } catch (std::exception const& error) {
    throw std::runtime_error(what + " in " + kTablesVariable + "=" + root + ": " + error.what());
  }
}

}  // namespace

std::string tables_root(std::string const& what) {
  char const* const folder = std::getenv(kTablesVariable);
  if (!folder || !*folder) {
    throw std::runtime_error(what + " is looked up by its name: set " + kTablesVariable + " to the tables' folder");
  }
  return folder;
}

std::string current_version(std::string const& root) {
  return said_of("the version in use", root, [&] { return digest(read_file(current_folder(root) / "manifest.json")); });
}

StoredTable find_stored_table(std::string const& root, std::string const& name) {
  return said_of("table '" + name + "'", root, [&] { return read_table(current_folder(root), name); });
}

}  // namespace hstu_trt::trt
