// Prints wanted_hot_rows(argv[1], argv[2]), or why the variable is refused, with exit code 1.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "../../plugins/csrc/trt/hot_rows.h"

int main(int, char** argv) try {
  std::printf("%lld\n", static_cast<long long>(hstu_trt::trt::wanted_hot_rows(argv[1], std::atoll(argv[2]))));
} catch (std::runtime_error const& error) {
  std::printf("%s\n", error.what());
  return 1;
}
