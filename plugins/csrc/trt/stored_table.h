// SPDX-License-Identifier: Apache-2.0
// A table in the folder that a deployment serves: what contract/table_format.py writes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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
};

struct StoredTable {
  std::string name;
  std::string folder;
  std::string version;  // of the folder: changes when any row does
  int64_t rows;
  int32_t dim;
  DataType type;
  std::vector<StoredShard> shards;

  int64_t row_bytes() const noexcept { return dim * (type == DataType::kFloat32 ? 4 : 2); }
};

// The table of that name in the folder HSTU_TRT_TABLES. Reads the manifest and the files' sizes, no rows.
// Throws std::runtime_error: no folder, no such table, damaged.
StoredTable find_stored_table(std::string const& name);

}  // namespace hstu_trt::trt
