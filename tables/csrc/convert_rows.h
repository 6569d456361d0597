// SPDX-License-Identifier: Apache-2.0
// One stored row -> one output row, rounded as numpy does: to nearest even, the scale multiplied in float32.
#pragma once

#include <cstdint>

namespace hstu_trt {

enum class RowType : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kFloat8E4m3 = 3 };

inline int64_t item_bytes(RowType type) { return type == RowType::kFloat32 ? 4 : type == RowType::kFloat16 ? 2 : 1; }

// dim values of `row` to `out`; scale counts for quantised rows only.
using ConvertRow = void (*)(void const* row, float scale, void* out, int64_t dim);

// The fastest conversion that this CPU has, or the portable one; nullptr if there is none to that type.
ConvertRow find_convert_row(RowType type, RowType out_type, bool portable);

}  // namespace hstu_trt
