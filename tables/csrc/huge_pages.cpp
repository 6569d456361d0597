// SPDX-License-Identifier: Apache-2.0
#include "huge_pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "thread_pool.h"

namespace hstu_trt {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kPartBytes = 16 << 20;

struct Reading {
  int file;
  int64_t offset, size;
  char* data;
  std::atomic<int> error{0};

  static void run_part(void* self, int64_t part) { static_cast<Reading*>(self)->read_part(part); }

  void read_part(int64_t part) {
    int64_t at = part * kPartBytes;
    int64_t const end = std::min(size, at + kPartBytes);
    while (at < end && error.load(std::memory_order_relaxed) == 0) {
      ssize_t const got = pread(file, data + at, end - at, offset + at);
      if (got > 0) {
        at += got;
      } else if (got == 0 || errno != EINTR) {
        error = got == 0 ? EIO : errno;
      }
    }
  }
};

}  // namespace

int read_file(char const* path, int64_t offset, int64_t size, int threads, HugePages* pages) {
  if (offset < 0 || size < 0 || size > INT64_MAX - kHugePage) return EINVAL;
  int const file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return errno;
  pages->mapped = size + kHugePage;
  pages->mapping = mmap(nullptr, pages->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages->mapping == MAP_FAILED) {
    int const error = errno;
    close(file);
    return error;
  }
  auto const address = reinterpret_cast<uintptr_t>(pages->mapping);
  pages->data = reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
  // Advice: where the kernel has no huge pages, small ones do.
  madvise(pages->data, size, MADV_HUGEPAGE);
  Reading reading{file, offset, size, static_cast<char*>(pages->data)};
  ThreadPool::of_process().run(threads, (size + kPartBytes - 1) / kPartBytes, Reading::run_part, &reading);
  close(file);
  if (reading.error != 0) release(*pages);
  return reading.error;
}

void release(HugePages const& pages) { munmap(pages.mapping, pages.mapped); }

}  // namespace hstu_trt
