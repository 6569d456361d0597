// SPDX-License-Identifier: Apache-2.0
// Tables in device memory, one copy per device however many engines and contexts look up in it; exchanged for those of
// another version while lookups go on.
#pragma once

#include <memory>
#include <string>

#include "../kernels/embedding/params.h"

namespace hstu_trt::trt {

// Seconds between looks at which version is in use; not set or 0: the one found first stays. A new version is loaded
// beside the old one and exchanged for it, all tables at once.
constexpr char kPollVariable[] = "HSTU_TRT_TABLES_POLL_S";

// A table that stays in memory while somebody holds it.
class SharedTable {
 public:
  virtual ~SharedTable() = default;

  // A word in device memory, which lookups and captured graphs read the tables in use from, and this table's place.
  virtual EmbeddingTable const* const* live_tables() const noexcept = 0;
  virtual int32_t place() const noexcept = 0;
  // Whether the word may change while a lookup runs.
  virtual bool changes() const noexcept = 0;
  virtual int32_t dim() const noexcept = 0;
  virtual DataType type() const noexcept = 0;
};

// The table of the folder HSTU_TRT_TABLES on the current device: loaded by the first who asks, shared with the others
// through TensorRT's plugin registry, freed behind the last. Throws std::runtime_error.
std::shared_ptr<SharedTable const> acquire_table(std::string const& name);

}  // namespace hstu_trt::trt
