// SPDX-License-Identifier: Apache-2.0
// A table in the folder that a deployment serves: what contract/table_format.py writes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../../tables/csrc/ids.h"
#include "../kernels/common/data_type.h"

namespace hstu_trt::trt {

// The environment variable that names the folder. A plan holds names of tables, never paths.
constexpr char kTablesVariable[] = "HSTU_TRT_TABLES";

// Consecutive rows of a table in one file.
struct StoredShard {
  std::string path;
  int64_t first_row;
  int64_t rows;
  int64_t payload_offset;  // bytes
  int64_t scale_offset;    // of quantised rows
};

// How an id becomes a row.
struct StoredIdRule {
  IdHash hash = IdHash::kNone;
  uint64_t seed = 0;
  int64_t default_row = kZeroRow;
  std::string permutation;  // path of its file
  int64_t permutation_offset = 0;
};

struct StoredTable {
  std::string name;
  std::string folder;
  std::string version;  // of the folder: changes when any row does
  int64_t rows = 0;
  int32_t dim = 0;
  DataType type = DataType::kFloat32;
  StoredIdRule ids;
  std::vector<StoredShard> shards;

  bool is_quantised() const noexcept { return type == DataType::kInt8 || type == DataType::kFloat8E4M3; }
  int64_t row_bytes() const noexcept {
    return dim * (type == DataType::kFloat32 ? int64_t{4} : type == DataType::kFloat16 ? int64_t{2} : int64_t{1});
  }
};

// What HSTU_TRT_TABLES names: a folder of tables, or one of versions, whose CURRENT names the version in use.
// Throws std::runtime_error if it names nothing; `what` begins the sentence.
std::string tables_root(std::string const& what);

// Digest of the manifest in use below a root: changes when any row does. Throws std::runtime_error.
std::string current_version(std::string const& root);

// The table of that name in the version in use below a root. Reads the manifest and the files' sizes, no rows.
// Throws std::runtime_error: no folder, no such table, damaged.
StoredTable find_stored_table(std::string const& root, std::string const& name);

}  // namespace hstu_trt::trt
