// SPDX-License-Identifier: Apache-2.0
// hstu_trt_plugin_host: drives the plugins as TensorRT would. `contract` needs no GPU; `run` does.
#include <cstdio>
#include <cstring>
#include <string>

#include "checks.h"
#include "contract.h"
#include "creators.h"
#include "gpu.h"

namespace {

constexpr char kUsage[] =
    "hstu_trt_plugin_host contract|run [--runtime LIBNVINFER] [--tables FOLDER] [--cases FOLDER] [--versions FOLDER]\n"
    "\n"
    "contract   what a builder asks of the plugins: shapes, types, formats, workspace, serialisation; needs no GPU\n"
    "run        enqueue on this GPU, against the fp32 kernel: types, streams, threads, CUDA graphs, overhead\n"
    "--runtime  take the creators from the plugin registry of this library (libnvinfer or libnvinfer_lean, 10 or 11);\n"
    "           without it, from the plugin library itself\n"
    "--tables   a folder of tables for lookups by name: a table item_id of width 8 (contract), or of contents\n"
    "           row * 8 + column (run)\n"
    "--cases    lookups by name with the rows that the host tier answers (run)\n"
    "--versions a folder of versions v1, v2, damaged and wide of a table item_id; changes which is in use (run)\n";

// Value of an option, or nullptr.
char const* option(int count, char** arguments, char const* name) {
  for (int i = 2; i + 1 < count; i += 2) {
    if (std::strcmp(arguments[i], name) == 0) return arguments[i + 1];
  }
  return nullptr;
}

bool are_known(int count, char** arguments) {
  for (int i = 2; i < count; i += 2) {
    std::string const name = arguments[i];
    if (name != "--runtime" && name != "--tables" && name != "--cases" && name != "--versions") return false;
  }
  return true;
}

std::string folder_of(std::string const& path) {
  size_t const slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

}  // namespace

int main(int count, char** arguments) {
  using namespace hstu_trt::host;
  std::string const verb = count > 1 ? arguments[1] : "";
  if ((verb != "contract" && verb != "run") || count % 2 != 0 || !are_known(count, arguments)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  std::string const libraries = folder_of(arguments[0]);
  std::string const plugins = libraries + "/libhstu_trt_plugins.so";
  char const* const runtime = option(count, arguments, "--runtime");
  char const* const tables = option(count, arguments, "--tables");
  Creators const creators =
      runtime ? load_through(runtime, plugins) : load_direct(plugins, libraries + "/libhstu_trt_stand_in.so");
  std::printf("creators from %s\n", creators.source.c_str());
  Checks checks;
  if (verb == "contract") {
    check_attention_contract(checks, creators);
    check_embedding_contract(checks, creators, tables);
  } else {
    run_attention(checks, creators);
    run_embedding(checks, creators, tables);
    if (char const* const cases = option(count, arguments, "--cases")) run_stored_cases(checks, creators, cases);
    if (char const* const versions = option(count, arguments, "--versions")) run_versions(checks, creators, versions);
    measure_overhead(checks, creators);
  }
  return checks.exit_code();
}
