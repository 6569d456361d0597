// SPDX-License-Identifier: Apache-2.0
// Lists of the fields of params structs, which mirrors of them are checked with.
#pragma once

#include <cstddef>

#include "capi.h"

#define HSTU_TRT_FIELD(Params, name) {#name, offsetof(Params, name), sizeof(Params::name)}

namespace hstu_trt {

// A list leaves no field out: each begins where the one before ends, but for padding of less than 8 bytes.
template <class Params, size_t kCount>
constexpr bool lists_every_field(HstuTrtField const (&fields)[kCount]) {
  size_t end = 0;
  for (HstuTrtField const& field : fields) {
    if (field.offset < end || field.offset - end >= (field.size >= 8 ? 8 : 4)) return false;
    end = field.offset + field.size;
  }
  return sizeof(Params) - end < 4 || (sizeof(Params) - end == 4 && end % 8 == 4);
}

}  // namespace hstu_trt
