// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work between lookups, since starting them would take longer than a lookup.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hstu_trt {

class ThreadPool {
 public:
  // Work on one of several parts, of which any thread may take any.
  using Work = void (*)(void* context, int64_t part);

  // The pool of this process; a forked child has one of its own, as threads do not survive a fork.
  static ThreadPool& of_process();

  // Does all parts on the caller and up to threads - 1 others, then returns. A second caller meanwhile works alone.
  void run(int threads, int64_t parts, Work work, void* context);

 private:
  struct Job {
    Work work;
    void* context;
    int64_t parts;
    int helpers;  // that may still join
    std::atomic<int64_t> next{0};

    void take_parts() {
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) work(context, part);
    }
  };

  void help();

  std::mutex one_job_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int active_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace hstu_trt
