// SPDX-License-Identifier: Apache-2.0
#include "device_table.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "log.h"

namespace hstu_trt::trt {
namespace {

constexpr size_t kAlignment = 256;        // of parts of the allocation
constexpr size_t kPinBytes = 4ull << 30;  // at a time: very large registrations were seen to fail elsewhere
constexpr size_t kThreads = 8;            // that read into host memory, and by that make its pages

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A file as memory, pages read when they are copied.
class MappedFile {
 public:
  MappedFile(std::string const& path, size_t size) : size_(size) {
    int const file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
      data_ = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
      close(file);
    }
    if (data_ == MAP_FAILED) throw std::runtime_error(path + " cannot be read");
    madvise(data_, size, MADV_SEQUENTIAL);
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(MappedFile const&) = delete;
  MappedFile& operator=(MappedFile const&) = delete;

  unsigned char const* at(int64_t offset) const noexcept { return static_cast<unsigned char const*>(data_) + offset; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_;
};

void copy_to_device(void const* to, void const* from, int64_t bytes, std::string const& what) {
  if (bytes > 0) {
    check(cudaMemcpy(const_cast<void*>(to), from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice), what);
  }
}

void copy_to_host(void* to, unsigned char const* from, size_t bytes) {
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  size_t const part = (bytes + kThreads - 1) / kThreads;
  for (size_t begin = 0; begin < bytes; begin += part) {
    auto const copy = [=] {
      std::memcpy(static_cast<unsigned char*>(to) + begin, from + begin, std::min(part, bytes - begin));
    };
    try {
      threads.emplace_back(copy);
    } catch (std::system_error const&) {  // no more threads: to leave with some running would end the process
      copy();
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

DeviceTable::DeviceTable(StoredTable const& stored, int64_t hot_rows) : version_(stored.version) {
  table_.rows = stored.rows;
  table_.hot_rows = hot_rows;
  if (stored.ids.hash == IdHash::kNone) table_.direct_rows = hot_rows;
  table_.cold_rows = stored.rows - hot_rows;
  table_.default_row = stored.ids.default_row;
  table_.seed = stored.ids.seed;
  table_.hash = stored.ids.hash;
  table_.id_count = stored.ids.hash == IdHash::kPermutation ? stored.rows : 0;
  try {
    load(stored);
  } catch (...) {
    free();
    throw;
  }
}

DeviceTable::~DeviceTable() { free(); }

void DeviceTable::load(StoredTable const& stored) {
  size_t const hot = aligned(static_cast<size_t>(table_.hot_rows * stored.row_bytes()));
  size_t const scales = stored.is_quantised() ? aligned(static_cast<size_t>(stored.rows) * sizeof(float)) : 0;
  size_t const permutation = static_cast<size_t>(table_.id_count) * sizeof(uint32_t);
  size_t const cold = static_cast<size_t>(table_.cold_rows * stored.row_bytes());
  std::string const what = "table '" + stored.name + "', " + std::to_string(hot + scales + permutation) +
                           " bytes on the GPU and " + std::to_string(cold) + " on the host";
  check(cudaMalloc(&device_, hot + scales + permutation + kAlignment), what);
  auto* const base = static_cast<unsigned char*>(device_);
  table_.hot = base;
  if (scales > 0) table_.scales = reinterpret_cast<float const*>(base + hot);
  if (table_.id_count > 0) table_.row_of_id = reinterpret_cast<uint32_t const*>(base + hot + scales);
  if (cold > 0) allocate_cold(cold, what);
  for (StoredShard const& shard : stored.shards) load_rows(stored, shard);
  if (table_.id_count > 0) {
    int64_t const bytes = 4 * table_.id_count;
    MappedFile const file(stored.ids.permutation, static_cast<size_t>(stored.ids.permutation_offset + bytes));
    copy_to_device(table_.row_of_id, file.at(stored.ids.permutation_offset), bytes, what);
  }
  // A copy from pageable memory may still be under way, and lookups run on streams that do not wait for it.
  check(cudaStreamSynchronize(nullptr), what);
  log_info("EmbeddingLookup: %s, version %s: loaded", what.c_str(), stored.version.c_str());
}

void DeviceTable::load_rows(StoredTable const& stored, StoredShard const& shard) {
  if (shard.rows == 0) return;
  std::string const what = shard.path;
  int64_t const row_bytes = stored.row_bytes();
  int64_t const end =
      stored.is_quantised() ? shard.scale_offset + 4 * shard.rows : shard.payload_offset + shard.rows * row_bytes;
  MappedFile const file(shard.path, static_cast<size_t>(end));
  int64_t const hot = std::clamp<int64_t>(table_.hot_rows - shard.first_row, 0, shard.rows);
  copy_to_device(static_cast<unsigned char const*>(table_.hot) + shard.first_row * row_bytes,
                 file.at(shard.payload_offset), hot * row_bytes, what);
  if (hot < shard.rows) {
    int64_t const first = shard.first_row + hot - table_.hot_rows;
    copy_to_host(static_cast<unsigned char*>(host_) + first * row_bytes,
                 file.at(shard.payload_offset + hot * row_bytes), static_cast<size_t>((shard.rows - hot) * row_bytes));
  }
  if (table_.scales) copy_to_device(table_.scales + shard.first_row, file.at(shard.scale_offset), 4 * shard.rows, what);
}

// Huge pages, so that the GPU's addresses take few entries; pinned before they are filled, which makes them.
void DeviceTable::allocate_cold(size_t bytes, std::string const& what) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(what + ": there is not enough host memory");
  host_ = memory;
  host_bytes_ = bytes;
  madvise(host_, bytes, MADV_HUGEPAGE);
  while (pinned_bytes_ < bytes) {
    size_t const part = std::min(kPinBytes, bytes - pinned_bytes_);
    auto* const at = static_cast<unsigned char*>(host_) + pinned_bytes_;
    check(cudaHostRegister(at, part, cudaHostRegisterDefault), what);
    pinned_bytes_ += part;
  }
  void* address = nullptr;
  check(cudaHostGetDevicePointer(&address, host_, 0), what);
  table_.cold = address;
}

void DeviceTable::free() noexcept {
  cudaFree(device_);
  for (size_t at = 0; at < pinned_bytes_; at += kPinBytes) cudaHostUnregister(static_cast<unsigned char*>(host_) + at);
  if (host_) munmap(host_, host_bytes_);
  device_ = host_ = nullptr;
  pinned_bytes_ = 0;
  cudaGetLastError();
}

}  // namespace hstu_trt::trt
