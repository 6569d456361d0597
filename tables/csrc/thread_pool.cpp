// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <unistd.h>

#include <system_error>

namespace hstu_trt {

ThreadPool& ThreadPool::of_process() {
  static std::mutex mutex;
  static ThreadPool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> const lock(mutex);
  if (owner != getpid()) {
    // Never destroyed: at exit its threads may still wait, and after a fork the parent's are not there to be joined.
    pool = new ThreadPool;
    owner = getpid();
  }
  return *pool;
}

void ThreadPool::run(int threads, int64_t parts, Work work, void* context) {
  Job job{work, context, parts, threads - 1};
  std::unique_lock<std::mutex> const only(one_job_, std::try_to_lock);
  if (threads < 2 || parts < 2 || !only.owns_lock()) {
    job.take_parts();
    return;
  }
  {
    std::lock_guard<std::mutex> const lock(mutex_);
    try {
      while (static_cast<int>(threads_.size()) < threads - 1) threads_.emplace_back([this] { help(); });
    } catch (std::system_error const&) {
      // Fewer threads than asked for do the same work.
    }
    job_ = &job;
  }
  for (int i = 1; i < threads && i < parts; ++i) wake_.notify_one();
  job.take_parts();
  std::unique_lock<std::mutex> lock(mutex_);
  job_ = nullptr;
  done_.wait(lock, [this] { return active_ == 0; });
}

void ThreadPool::help() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return job_ != nullptr && job_->helpers > 0; });
    Job& job = *job_;
    --job.helpers;
    ++active_;
    lock.unlock();
    job.take_parts();
    lock.lock();
    if (--active_ == 0) done_.notify_one();
  }
}

}  // namespace hstu_trt
