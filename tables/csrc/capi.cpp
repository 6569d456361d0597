// SPDX-License-Identifier: Apache-2.0
// The library's C face, for tables/native.py.
#include <cerrno>
#include <cstddef>
#include <new>

#include "gather.h"
#include "huge_pages.h"

#define HSTU_TRT_API extern "C" __attribute__((visibility("default")))

HSTU_TRT_API int32_t hstu_trt_tables_abi_version() { return 2; }

HSTU_TRT_API size_t hstu_trt_tables_gather_params_size() { return sizeof(hstu_trt::GatherParams); }

// 0, EINVAL (no such conversion) or ENOMEM.
HSTU_TRT_API int32_t hstu_trt_tables_gather(hstu_trt::GatherParams const* params, hstu_trt::GatherResult* result) {
  try {
    return hstu_trt::gather(*params, result) ? 0 : EINVAL;
  } catch (std::bad_alloc const&) {
    return ENOMEM;
  }
}

HSTU_TRT_API void hstu_trt_tables_index_rows(int64_t const* numbers, int64_t count, uint32_t* slots, int64_t capacity) {
  hstu_trt::index_rows(numbers, count, slots, capacity);
}

HSTU_TRT_API int32_t hstu_trt_tables_read_file(char const* path, int64_t offset, int64_t size, int32_t threads,
                                               hstu_trt::HugePages* pages) {
  try {
    return hstu_trt::read_file(path, offset, size, threads, pages);
  } catch (std::bad_alloc const&) {
    return ENOMEM;
  }
}

HSTU_TRT_API void hstu_trt_tables_release(hstu_trt::HugePages const* pages) { hstu_trt::release(*pages); }

HSTU_TRT_API uint64_t hstu_trt_tables_splitmix64(int64_t id, uint64_t seed) { return hstu_trt::splitmix64(id, seed); }

HSTU_TRT_API int64_t hstu_trt_tables_fastrange(uint64_t hash, int64_t rows) {
  return static_cast<int64_t>(hstu_trt::multiply_high(hash, rows));
}
