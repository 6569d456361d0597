// A backend in front of Triton's Python backend: it refuses the requests that would kill, or bloat, a model process,
// and hands on all others.
//
//   A shape whose byte count wraps around 2^64 fits data of another size: [2^60, 2] of INT64 "is" 0 bytes. Servers
//   before 2026 let it through, and the Python backend makes an array of it outside of any try: the process ends.
//   Tensors, ids and parameters are copied into shared memory that never shrinks again, before any model sees them.
//
// Lies as libtriton_python.so beside the real one, renamed kReal. The environment says how many bytes a request to a
// model may hold, as in HSTU_TRT_GUARD="embedding_lookup=65536 ranking_fused=65536"; a model that it does not name has
// no bound. Declares what it uses of tritonbackend.h, whose ABI has been stable since version 1.

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
struct TRITONSERVER_Error;
TRITONSERVER_Error* TRITONSERVER_ErrorNew(int code, const char* message);
void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
uint32_t TRITONSERVER_DataTypeByteSize(int datatype);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceModel(void* instance, void** model);
TRITONSERVER_Error* TRITONBACKEND_ModelName(void* model, const char** name);
TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportStatistics(
    void* instance, void* request, bool success, uint64_t start, uint64_t compute, uint64_t computed, uint64_t end);
TRITONSERVER_Error* TRITONBACKEND_RequestId(void* request, const char** id);
TRITONSERVER_Error* TRITONBACKEND_RequestParameterCount(void* request, uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestParameter(
    void* request, uint32_t index, const char** key, int* type, const void** value);
TRITONSERVER_Error* TRITONBACKEND_RequestInputCount(void* request, uint32_t* count);
TRITONSERVER_Error* TRITONBACKEND_RequestInputByIndex(void* request, uint32_t index, void** input);
TRITONSERVER_Error* TRITONBACKEND_InputProperties(
    void* input, const char** name, int* datatype, const int64_t** shape, uint32_t* dims, uint64_t* bytes,
    uint32_t* buffers);
TRITONSERVER_Error* TRITONBACKEND_ResponseNew(void** response, void* request);
TRITONSERVER_Error* TRITONBACKEND_ResponseSend(void* response, uint32_t flags, TRITONSERVER_Error* error);
TRITONSERVER_Error* TRITONBACKEND_RequestRelease(void* request, uint32_t flags);
}

namespace {

constexpr char kReal[] = "libtriton_python_unguarded.so";
constexpr char kLimits[] = "HSTU_TRT_GUARD";
constexpr int kInternal = 1, kInvalid = 3;          // TRITONSERVER_Error_Code
constexpr uint32_t kFinal = 1, kReleaseAll = 1;     // response and release flags
constexpr int kString = 0;                          // TRITONSERVER_ParameterType
constexpr size_t kMostIdBytes = 1024, kMostParameterBytes = 16384;
constexpr uint32_t kMostParameters = 64;

using Forward = TRITONSERVER_Error* (*)(void*);
using Execute = TRITONSERVER_Error* (*)(void*, void**, uint32_t);

void* real_library = nullptr;
std::map<std::string, uint64_t> most_bytes;

// Errors of calls that only ask cannot happen for a request that Triton handed us; were one to, the request goes on.
void ignore(TRITONSERVER_Error* error) {
  if (error != nullptr) TRITONSERVER_ErrorDelete(error);
}

void read_limits() {
  const char* text = std::getenv(kLimits);
  std::istringstream words(text == nullptr ? "" : text);
  for (std::string word; words >> word;) {
    size_t equals = word.find('=');
    if (equals != std::string::npos) {
      most_bytes[word.substr(0, equals)] = std::strtoull(word.c_str() + equals + 1, nullptr, 10);
    }
  }
}

TRITONSERVER_Error* open_real() {
  Dl_info here{};
  dladdr(reinterpret_cast<void*>(&open_real), &here);
  std::string path = here.dli_fname;
  path = path.substr(0, path.rfind('/') + 1) + kReal;
  real_library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  return real_library == nullptr ? TRITONSERVER_ErrorNew(kInternal, dlerror()) : nullptr;
}

TRITONSERVER_Error* forward(const char* function, void* argument) {
  auto real = reinterpret_cast<Forward>(dlsym(real_library, function));
  return real == nullptr ? nullptr : real(argument);
}

// Why a tensor's data and shape disagree, or "". Triton has compared them too, but in 64 bits that wrap around.
std::string shape_fault(const char* name, int datatype, const int64_t* shape, uint32_t dims, uint64_t bytes) {
  const unsigned __int128 most = INT64_MAX;
  unsigned __int128 size = TRITONSERVER_DataTypeByteSize(datatype);
  if (size == 0) return "";  // strings: Triton has counted them
  std::string text;
  bool fits = true, empty = false;
  for (uint32_t axis = 0; axis < dims; ++axis) {
    text += (axis ? ", " : "") + std::to_string(shape[axis]);
    fits = fits && shape[axis] >= 0;
    empty = empty || shape[axis] == 0;
    if (fits && shape[axis] > 0) size *= static_cast<uint64_t>(shape[axis]);
    fits = fits && size <= most;  // of an empty tensor too: numpy refuses [2^62, 2^62, 0]
  }
  if (fits && (empty ? 0 : size) == bytes) return "";
  return std::string("tensor '") + name + "' has shape [" + text + "], which its " + std::to_string(bytes) +
         " bytes do not fill";
}

std::string tensors_fault(void* request, const std::string& model) {
  uint32_t count = 0;
  ignore(TRITONBACKEND_RequestInputCount(request, &count));
  uint64_t total = 0, largest = 0;
  std::string largest_name;
  for (uint32_t index = 0; index < count; ++index) {
    void* input = nullptr;
    const char* name = "";
    const int64_t* shape = nullptr;
    int datatype = 0;
    uint32_t dims = 0, buffers = 0;
    uint64_t bytes = 0;
    ignore(TRITONBACKEND_RequestInputByIndex(request, index, &input));
    ignore(TRITONBACKEND_InputProperties(input, &name, &datatype, &shape, &dims, &bytes, &buffers));
    std::string fault = shape_fault(name, datatype, shape, dims, bytes);
    if (!fault.empty()) return fault;
    total += bytes;
    if (bytes > largest) largest = bytes, largest_name = name;
  }
  auto most = most_bytes.find(model);
  if (most == most_bytes.end() || total <= most->second) return "";
  return "the request holds " + std::to_string(total) + " bytes, " + std::to_string(largest) + " of them in tensor '" +
         largest_name + "'; at most " + std::to_string(most->second) + " are served";
}

std::string words_fault(void* request) {
  const char* id = "";
  ignore(TRITONBACKEND_RequestId(request, &id));
  size_t length = std::strlen(id);
  if (length > kMostIdBytes) {
    return "the request's id has " + std::to_string(length) + " bytes; at most " + std::to_string(kMostIdBytes) +
           " are served";
  }
  uint32_t count = 0;
  ignore(TRITONBACKEND_RequestParameterCount(request, &count));
  size_t total = 0;
  for (uint32_t index = 0; index < count && index < kMostParameters; ++index) {
    const char* key = "";
    int type = 0;
    const void* value = nullptr;
    ignore(TRITONBACKEND_RequestParameter(request, index, &key, &type, &value));
    total += std::strlen(key) + (type == kString ? std::strlen(static_cast<const char*>(value)) : 0);
  }
  if (count <= kMostParameters && total <= kMostParameterBytes) return "";
  return "the request has " + std::to_string(count) + " parameters of " + std::to_string(total) +
         " bytes or more; at most " + std::to_string(kMostParameters) + " of " + std::to_string(kMostParameterBytes) +
         " bytes are served";
}

void refuse(void* instance, void* request, const char* why, int code) {
  auto since_epoch = std::chrono::steady_clock::now().time_since_epoch();
  uint64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(since_epoch).count();
  TRITONSERVER_Error* error = TRITONSERVER_ErrorNew(code, why);
  void* response = nullptr;
  ignore(TRITONBACKEND_ResponseNew(&response, request));
  if (response != nullptr) ignore(TRITONBACKEND_ResponseSend(response, kFinal, error));
  TRITONSERVER_ErrorDelete(error);
  ignore(TRITONBACKEND_ModelInstanceReportStatistics(instance, request, false, now, now, now, now));
  ignore(TRITONBACKEND_RequestRelease(request, kReleaseAll));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error*

EXPORT TRITONBACKEND_Initialize(void* backend) {
  read_limits();
  TRITONSERVER_Error* error = open_real();
  return error != nullptr ? error : forward(__func__, backend);
}
EXPORT TRITONBACKEND_Finalize(void* backend) { return forward(__func__, backend); }
EXPORT TRITONBACKEND_GetBackendAttribute(void* backend, void* attributes) {
  using Two = TRITONSERVER_Error* (*)(void*, void*);
  auto real = reinterpret_cast<Two>(dlsym(real_library, __func__));
  return real == nullptr ? nullptr : real(backend, attributes);
}
EXPORT TRITONBACKEND_ModelInitialize(void* model) { return forward(__func__, model); }
EXPORT TRITONBACKEND_ModelFinalize(void* model) { return forward(__func__, model); }
EXPORT TRITONBACKEND_ModelInstanceInitialize(void* instance) { return forward(__func__, instance); }
EXPORT TRITONBACKEND_ModelInstanceFinalize(void* instance) { return forward(__func__, instance); }

EXPORT TRITONBACKEND_ModelInstanceExecute(void* instance, void** requests, uint32_t count) {
  static auto real = reinterpret_cast<Execute>(dlsym(real_library, __func__));
  void* model = nullptr;
  const char* name = "";
  ignore(TRITONBACKEND_ModelInstanceModel(instance, &model));
  ignore(TRITONBACKEND_ModelName(model, &name));
  std::vector<void*> good;
  std::vector<std::pair<void*, std::string>> bad;
  for (uint32_t index = 0; index < count; ++index) {
    std::string fault = words_fault(requests[index]);
    if (fault.empty()) fault = tensors_fault(requests[index], name);
    if (fault.empty()) {
      good.push_back(requests[index]);
    } else {
      bad.emplace_back(requests[index], fault);
    }
  }
  // An error hands the requests back to Triton, so none may have been answered before; once it is gone all are ours.
  TRITONSERVER_Error* error = good.empty() ? nullptr : real(instance, good.data(), good.size());
  if (error != nullptr && bad.empty()) return error;
  for (void* request : error != nullptr ? good : std::vector<void*>{}) {
    refuse(instance, request, "the model process could not be asked", kInternal);
  }
  ignore(error);
  for (const auto& [request, fault] : bad) refuse(instance, request, fault.c_str(), kInvalid);
  return nullptr;
}
