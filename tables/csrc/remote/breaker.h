// SPDX-License-Identifier: Apache-2.0
// A circuit breaker per node, so that requests do not wait for a node that is known to be down.
#pragma once

#include <cstdint>
#include <mutex>

namespace hstu_trt::remote {

// Closed until `failures` in a row; then open for a while; then half open: one request tries the node.
class Breaker {
 public:
  Breaker(int failures, int64_t open_us) : limit_(failures), open_us_(open_us) {}

  // Whether a request may use the node now. A probe whose outcome is never told is granted again after open_us.
  bool allow(int64_t now_us) {
    std::lock_guard const lock(mutex_);
    if (failures_ < limit_) return true;
    if (now_us < until_us_) return false;
    until_us_ = now_us + open_us_;
    return true;
  }

  void succeeded() {
    std::lock_guard const lock(mutex_);
    failures_ = 0;
  }

  // True if this failure opened the breaker.
  bool failed(int64_t now_us) {
    std::lock_guard const lock(mutex_);
    until_us_ = now_us + open_us_;
    return ++failures_ == limit_;
  }

  bool is_open() {
    std::lock_guard const lock(mutex_);
    return failures_ >= limit_;
  }

 private:
  std::mutex mutex_;
  int const limit_;
  int64_t const open_us_;
  int failures_ = 0;
  int64_t until_us_ = 0;
};

}  // namespace hstu_trt::remote
