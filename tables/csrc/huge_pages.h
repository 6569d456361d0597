// SPDX-License-Identifier: Apache-2.0
// Files read into memory of huge pages: random rows of a large table miss the TLB on small ones.
#pragma once

#include <cstdint>

namespace hstu_trt {

struct HugePages {
  void* data;      // 2 MiB aligned
  void* mapping;   // for release
  int64_t mapped;  // bytes
};

// Reads bytes [offset, offset + size) of a file with several threads. Returns 0 or an errno value; EIO: too short.
int read_file(char const* path, int64_t offset, int64_t size, int threads, HugePages* pages);

void release(HugePages const& pages);

}  // namespace hstu_trt
