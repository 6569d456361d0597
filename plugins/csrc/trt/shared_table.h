// SPDX-License-Identifier: Apache-2.0
// Tables in device memory, one copy per device however many engines and contexts look up in it.
#pragma once

#include <memory>
#include <string>

#include "../kernels/embedding/params.h"

namespace hstu_trt::trt {

// A table that stays in memory while somebody holds it.
class SharedTable {
 public:
  virtual ~SharedTable() = default;

  // In device memory, so that captured launches see a table that was exchanged.
  virtual EmbeddingTable const* live() const noexcept = 0;
  virtual int32_t dim() const noexcept = 0;
  virtual DataType type() const noexcept = 0;
};

// The table of the folder HSTU_TRT_TABLES on the current device: loaded by the first who asks, shared with the others
// through TensorRT's plugin registry, freed behind the last. Throws std::runtime_error.
std::shared_ptr<SharedTable const> acquire_table(std::string const& name);

}  // namespace hstu_trt::trt
