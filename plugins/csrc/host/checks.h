// SPDX-License-Identifier: Apache-2.0
// A check has a name, passes or fails, and is printed; the program's exit code says whether all passed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace hstu_trt::host {

class Checks {
 public:
  bool check(bool passed, std::string const& name, std::string const& detail = {}) {
    (passed ? passed_ : failed_) += 1;
    std::printf("%s %s%s%s\n", passed ? "ok  " : "FAIL", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
    return passed;
  }

  // 0 if something was checked and nothing failed.
  int exit_code() const {
    std::printf("%d checks passed, %d failed\n", passed_, failed_);
    return passed_ > 0 && failed_ == 0 ? 0 : 1;
  }

 private:
  int passed_ = 0, failed_ = 0;
};

// What must work for the checks to mean anything ends the program.
inline void must(bool condition, char const* what) {
  if (condition) return;
  std::fprintf(stderr, "hstu_trt_plugin_host: %s\n", what);
  std::exit(2);
}

inline void must(cudaError_t error) { must(error == cudaSuccess, cudaGetErrorString(error)); }

}  // namespace hstu_trt::host
