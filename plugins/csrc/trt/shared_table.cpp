// SPDX-License-Identifier: Apache-2.0
#include "shared_table.h"

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "log.h"
#include "resources.h"
#include "stored_table.h"

namespace hstu_trt::trt {
namespace {

constexpr size_t kRowsOffset = 256;  // of the allocation: the EmbeddingTable stands before its rows

void check(cudaError_t error, std::string const& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

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

  unsigned char const* data() const noexcept { return static_cast<unsigned char const*>(data_); }

 private:
  void* data_ = MAP_FAILED;
  size_t size_;
};

// The resource under a table's key. TensorRT keeps a clone of the first caller's; only clones load their rows.
class TableResource final : public nvinfer1::IPluginResource {
 public:
  explicit TableResource(StoredTable stored) : stored_(std::move(stored)) {}
  ~TableResource() noexcept override { release(); }

  int32_t release() noexcept override {
    cudaError_t const error = cudaFree(memory_);
    memory_ = nullptr;
    return error == cudaSuccess ? 0 : -1;
  }

  nvinfer1::IPluginResource* clone() noexcept override {
    return guarded("EmbeddingLookup", stored_.name.c_str(), static_cast<nvinfer1::IPluginResource*>(nullptr),
                   [this]() -> nvinfer1::IPluginResource* {
                     auto result = std::make_unique<TableResource>(stored_);
                     result->load();
                     return result.release();
                   });
  }

  EmbeddingTable const* live() const noexcept { return static_cast<EmbeddingTable const*>(memory_); }

 private:
  void load() {
    int64_t const bytes = stored_.rows * stored_.row_bytes();
    std::string const what = "table '" + stored_.name + "', " + std::to_string(bytes) + " bytes";
    check(cudaMalloc(&memory_, kRowsOffset + static_cast<size_t>(bytes)), what);
    auto* const rows = static_cast<unsigned char*>(memory_) + kRowsOffset;
    for (StoredShard const& shard : stored_.shards) load(shard, rows, what);
    EmbeddingTable const table{rows, stored_.rows};
    check(cudaMemcpy(memory_, &table, sizeof(table), cudaMemcpyHostToDevice), what);
    // A copy from pageable memory may still be under way, and lookups run on streams that do not wait for it.
    check(cudaStreamSynchronize(nullptr), what);
    log_info("EmbeddingLookup: %s, version %s: loaded", what.c_str(), stored_.version.c_str());
  }

  void load(StoredShard const& shard, unsigned char* rows, std::string const& what) {
    int64_t const bytes = shard.rows * stored_.row_bytes();
    if (bytes == 0) return;
    MappedFile const file(shard.path, static_cast<size_t>(shard.payload_offset + bytes));
    check(cudaMemcpy(rows + shard.first_row * stored_.row_bytes(), file.data() + shard.payload_offset,
                     static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
          what);
  }

  StoredTable stored_;
  void* memory_ = nullptr;
};

class AcquiredTable final : public SharedTable {
 public:
  AcquiredTable(StoredTable const& stored, std::string key)
      : key_(std::move(key)), dim_(stored.dim), type_(stored.type) {
    TableResource prototype(stored);
    auto* const resource = static_cast<TableResource*>(acquire_resource(key_.c_str(), prototype));
    if (!resource) throw std::runtime_error("table '" + stored.name + "' was not loaded");
    live_ = resource->live();
  }
  ~AcquiredTable() override { release_resource(key_.c_str()); }
  AcquiredTable(AcquiredTable const&) = delete;
  AcquiredTable& operator=(AcquiredTable const&) = delete;

  EmbeddingTable const* live() const noexcept override { return live_; }
  int32_t dim() const noexcept override { return dim_; }
  DataType type() const noexcept override { return type_; }

 private:
  std::string key_;
  EmbeddingTable const* live_;
  int32_t dim_;
  DataType type_;
};

}  // namespace

std::shared_ptr<SharedTable const> acquire_table(std::string const& name) {
  StoredTable const stored = find_stored_table(name);
  int device = 0;
  check(cudaGetDevice(&device), "table '" + name + "'");
  std::string const key =
      "hstu.trt/table/" + stored.folder + "/" + name + "@" + stored.version + "/cuda:" + std::to_string(device);
  return std::make_shared<AcquiredTable>(stored, key);
}

}  // namespace hstu_trt::trt
