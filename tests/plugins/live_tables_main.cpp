// LiveTables without a GPU or a folder: device memory is the host's, and versions change when a case says so.
// Prints what the word points at after each step of the case that argv[1] names, or the sentence of an error.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>

#include "../../plugins/csrc/kernels/embedding/embedding.h"
#include "../../plugins/csrc/trt/hot_rows.h"
#include "../../plugins/csrc/trt/live_tables.h"
#include "../../plugins/csrc/trt/log.h"

namespace {

int g_version = 1;        // in use
int g_change_after = -1;  // readings of a table until the next version is in use; negative: never

}  // namespace

namespace hstu_trt::trt {

StoredTable find_stored_table(std::string const&, std::string const& name) {
  StoredTable stored;
  stored.name = name;
  stored.version = std::to_string(g_version);
  stored.rows = 10;
  stored.dim = 8 * g_version;
  if (g_change_after > 0 && --g_change_after == 0) ++g_version;
  // What is served keeps its width.
  if (name == "a") stored.dim = 8;
  return stored;
}

std::string current_version(std::string const&) { return std::to_string(g_version); }

DeviceTable::DeviceTable(StoredTable const& stored, int64_t) : version_(stored.version) {
  table_.version = std::strtoull(stored.version.c_str(), nullptr, 10);
  table_.rows = stored.dim;  // the width that was loaded
}
DeviceTable::~DeviceTable() = default;

int64_t wanted_hot_rows(std::string const&, int64_t rows) { return rows; }
void log_error(char const*, ...) noexcept {}
void log_info(char const*, ...) noexcept {}

}  // namespace hstu_trt::trt

namespace hstu_trt {

cudaError_t launch_embedding_publish(EmbeddingTable const** live_tables, EmbeddingTable const* tables,
                                     cudaStream_t) noexcept {
  *live_tables = tables;
  return cudaSuccess;
}

}  // namespace hstu_trt

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMalloc(void** to, size_t bytes) { return *to = std::malloc(bytes), cudaSuccess; }
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
}

namespace {

using hstu_trt::trt::LiveTables;

// Opens a table: version and width of all that are in use then, and the width that its lookups go by.
void open(LiveTables& live, char const* name) {
  static int count = 0;
  try {
    LiveTables::Place const place = live.open(name);
    ++count;
    for (int i = 0; i < count; ++i) {
      hstu_trt::EmbeddingTable const& table = (*live.word())[i];
      std::printf("%s%llu:%lld", i ? " " : "", static_cast<unsigned long long>(table.version),
                  static_cast<long long>(table.rows));
    }
    std::printf(" as %d\n", place.dim);
  } catch (std::runtime_error const& error) {
    std::printf("%s\n", error.what());
  }
}

std::map<std::string, std::function<void(LiveTables&)>> const kCases = {
    {"still", [](LiveTables& live) { open(live, "b"); }},
    {"changed before", [](LiveTables& live) { g_version = 2, open(live, "b"); }},
    {"changes after the first reading", [](LiveTables& live) { g_change_after = 1, open(live, "b"); }},
    {"changes while all are loaded anew", [](LiveTables& live) { g_version = 2, g_change_after = 2, open(live, "b"); }},
};

}  // namespace

int main(int, char** argv) {
  constexpr double kPollSeconds = 3600;  // nobody looks meanwhile
  LiveTables live("folder", kPollSeconds);
  open(live, "a");
  kCases.at(argv[1])(live);
}
