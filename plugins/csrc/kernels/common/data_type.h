// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace hstu_trt {

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8E4M3 = 3, kInt8 = 4 };

}  // namespace hstu_trt
