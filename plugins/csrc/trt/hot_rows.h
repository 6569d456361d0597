// SPDX-License-Identifier: Apache-2.0
// How many rows of a table are in GPU memory. Knows neither TensorRT nor CUDA.
#pragma once

#include <cstdint>
#include <string>

namespace hstu_trt::trt {

// Which rows of which table are in GPU memory: "item_id=1000000,user_id=0". Tables that are not named are there whole.
// A deployment decides that, not a plan: it depends on the GPU.
constexpr char kHotRowsVariable[] = "HSTU_TRT_TABLES_HOT_ROWS";

// Rows of the table that the variable leaves in GPU memory. Throws std::runtime_error for text that is no such list.
int64_t wanted_hot_rows(std::string const& name, int64_t rows);

}  // namespace hstu_trt::trt
