// Loaded ahead of tritonserver (LD_PRELOAD): sees requests before the server does anything for them.
//
//   Too many in flight are refused with UNAVAILABLE, as soon as the name of their model is known: before their tensors
//   are looked at, and before any queue, of which Triton's own have no bound.
//   Requests for classes in place of scores are refused. Servers before July 2025 divide by the item size of the output,
//   which is 0 for strings: one request for the classes of `tables_version` ended the server. Later ones sort every
//   element of an output, however large. Scores are no classes, so nobody needs them.
//   What the Python backend and its stubs wait for, a second until a time of the day, becomes a wait of a second. A wall
//   clock that is set forward would end their waits for messages, upon which they call a model process unhealthy and
//   fail its requests from then on; one that is set back would make them wait for the hours that it was set by.
//
// The environment says how many requests to a model may be in flight, as HSTU_TRT_DOORS="ranking=embedding_lookup:8+3":
// 8 that wait and 3 that are worked on, and which model the count of refused requests names. A model that it does not
// name has no bound. Declares what it uses of tritonserver.h, whose ABI has been stable since version 1.

#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

extern "C" {
struct TRITONSERVER_Error;
TRITONSERVER_Error* TRITONSERVER_ErrorNew(int code, const char* message);
void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
void* TRITONSERVER_ParameterNew(const char* name, int type, const void* value);
void TRITONSERVER_ParameterDelete(void* parameter);
TRITONSERVER_Error* TRITONSERVER_MetricFamilyNew(void** family, int kind, const char* name, const char* description);
TRITONSERVER_Error* TRITONSERVER_MetricNew(void** metric, void* family, const void** labels, uint64_t count);
TRITONSERVER_Error* TRITONSERVER_MetricIncrement(void* metric, double by);
}

namespace {

constexpr char kDoors[] = "HSTU_TRT_DOORS";
constexpr int kInvalid = 3, kUnavailable = 4;  // TRITONSERVER_Error_Code
constexpr uint32_t kFinal = 1;                 // response flag
constexpr int kString = 0, kCounter = 0;       // TRITONSERVER_ParameterType, TRITONSERVER_MetricKind
// The same as in live_metrics.py: Triton joins the two, and the models' is there before anything is refused.
constexpr char kShed[] = "hstu_trt_shed_total";
constexpr char kShedText[] = "Requests refused at once (UNAVAILABLE), since too many waited";

using Answered = void (*)(void* response, const uint32_t flags, void* argument);

void ignore(TRITONSERVER_Error* error) {
  if (error != nullptr) TRITONSERVER_ErrorDelete(error);
}

template <typename Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

// Where the requests to a model come in.
class Door {
 public:
  Door(std::string label, int64_t waiting, int64_t worked_on)
      : label_(std::move(label)),
        refusal_("overloaded: " + std::to_string(waiting) + " requests wait already"),
        most_(waiting + worked_on) {}

  // Null, or why no further request may come in.
  TRITONSERVER_Error* refuse() {
    if (in_flight_ < most_) return nullptr;
    count();
    return TRITONSERVER_ErrorNew(kUnavailable, refusal_.c_str());
  }
  void enter() { ++in_flight_; }
  void leave() { --in_flight_; }

 private:
  void count() {
    std::call_once(counted_, [this] {
      void* family = nullptr;  // stays null where the server keeps no metrics
      ignore(TRITONSERVER_MetricFamilyNew(&family, kCounter, kShed, kShedText));
      if (family == nullptr) return;
      void* parameter = TRITONSERVER_ParameterNew("model", kString, label_.c_str());
      const void* labels[] = {parameter};
      ignore(TRITONSERVER_MetricNew(&shed_, family, labels, 1));
      TRITONSERVER_ParameterDelete(parameter);
    });
    if (shed_ != nullptr) ignore(TRITONSERVER_MetricIncrement(shed_, 1));
  }

  const std::string label_, refusal_;
  const int64_t most_;
  std::atomic<int64_t> in_flight_{0};
  std::once_flag counted_;
  void* shed_ = nullptr;
};

// What the environment names; lives as long as the process, since answers may come while it ends.
std::map<std::string, Door, std::less<>>& doors() {
  static auto* found = [] {
    auto* doors = new std::map<std::string, Door, std::less<>>;
    const char* text = std::getenv(kDoors);
    std::istringstream words(text == nullptr ? "" : text);
    for (std::string word; words >> word;) {
      size_t equals = word.find('='), colon = word.find(':'), plus = word.find('+');
      if (equals > colon || colon > plus || plus == std::string::npos) continue;
      doors->try_emplace(word.substr(0, equals), word.substr(equals + 1, colon - equals - 1),
                         std::atoll(word.c_str() + colon + 1), std::atoll(word.c_str() + plus + 1));
    }
    return doors;
  }();
  return *found;
}

// A request that may be sent off, and whom to tell of its answer.
struct Ticket {
  Door* door;
  Answered answered;
  void* argument;
};

// The request that this thread prepares: the server makes one, says whom to tell, and sends it off, in this order.
struct Prepared {
  const void* request = nullptr;
  Door* door = nullptr;
  std::unique_ptr<Ticket> ticket;
};
thread_local Prepared prepared;

void answer(void* response, const uint32_t flags, void* argument) {
  auto* ticket = static_cast<Ticket*>(argument);
  const Ticket told = *ticket;
  if (flags & kFinal) {  // before the client knows, who may send the next at once
    told.door->leave();
    delete ticket;
  }
  told.answered(response, flags, told.argument);
}

// Whether it is the Python backend, or a stub of it, that waits. The locks of Python before 3.11, among others, wait in
// the same functions for as long as they like.
bool is_python_backend(const void* caller) {
  Dl_info of;
  if (dladdr(caller, &of) == 0 || of.dli_fname == nullptr) return false;
  const char* slash = std::strrchr(of.dli_fname, '/');
  return std::strstr(slash == nullptr ? of.dli_fname : slash, "triton_python") != nullptr;
}

// The moment of the monotonic clock that is as far away as this one of the wall clock is now. The Python backend waits
// for a second; a moment that has passed, or is minutes away, means that the clock was set since it was chosen.
timespec monotonic(const timespec* due) {
  constexpr int64_t kSecond = 1'000'000'000;
  timespec wall, now;
  clock_gettime(CLOCK_REALTIME, &wall);
  clock_gettime(CLOCK_MONOTONIC, &now);
  int64_t left = (due->tv_sec - wall.tv_sec) * kSecond + due->tv_nsec - wall.tv_nsec;
  if (left < 0 || left > 60 * kSecond) left = kSecond;
  const int64_t until = now.tv_sec * kSecond + now.tv_nsec + left;
  return {until / kSecond, until % kSecond};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int sem_timedwait(sem_t* semaphore, const timespec* due) {
  static auto wait = real<int (*)(sem_t*, const timespec*)>(__func__);
  if (!is_python_backend(__builtin_return_address(0))) return wait(semaphore, due);
  const timespec until = monotonic(due);
  return sem_clockwait(semaphore, CLOCK_MONOTONIC, &until);
}

EXPORT int pthread_mutex_timedlock(pthread_mutex_t* mutex, const timespec* due) noexcept {
  static auto lock = real<int (*)(pthread_mutex_t*, const timespec*)>(__func__);
  if (!is_python_backend(__builtin_return_address(0))) return lock(mutex, due);
  const timespec until = monotonic(due);
  return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
}

EXPORT TRITONSERVER_Error* TRITONSERVER_InferenceRequestNew(void** request, void* server, const char* model, int64_t version) {
  static auto made = real<TRITONSERVER_Error* (*)(void**, void*, const char*, int64_t)>(__func__);
  prepared = Prepared{};
  auto found = doors().find(model);
  Door* door = found == doors().end() ? nullptr : &found->second;
  if (TRITONSERVER_Error* error = door == nullptr ? nullptr : door->refuse()) return error;
  TRITONSERVER_Error* error = made(request, server, model, version);
  if (error == nullptr) prepared.request = *request, prepared.door = door;
  return error;
}

EXPORT TRITONSERVER_Error* TRITONSERVER_InferenceRequestSetResponseCallback(
    void* request, void* allocator, void* allocator_argument, Answered answered, void* argument) {
  static auto set = real<TRITONSERVER_Error* (*)(void*, void*, void*, Answered, void*)>(__func__);
  if (prepared.request != request || prepared.door == nullptr) {
    return set(request, allocator, allocator_argument, answered, argument);
  }
  prepared.ticket.reset(new Ticket{prepared.door, answered, argument});
  return set(request, allocator, allocator_argument, answer, prepared.ticket.get());
}

EXPORT TRITONSERVER_Error* TRITONSERVER_ServerInferAsync(void* server, void* request, void* trace) {
  static auto send = real<TRITONSERVER_Error* (*)(void*, void*, void*)>(__func__);
  if (prepared.request != request || prepared.ticket == nullptr) return send(server, request, trace);
  Door* door = prepared.door;
  Ticket* ticket = prepared.ticket.release();  // `answer` deletes it, maybe before the call returns
  door->enter();
  TRITONSERVER_Error* error = send(server, request, trace);
  if (error != nullptr) {  // and nobody will be told
    door->leave();
    delete ticket;
  }
  return error;
}

EXPORT TRITONSERVER_Error* TRITONSERVER_ServerModelBatchProperties(void*, const char*, int64_t, uint32_t*, void**) {
  return TRITONSERVER_ErrorNew(kInvalid, "parameter 'classification' of an output is not served: leave it out");
}
