// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>

#include "../capi/capi.h"
#include "attention_runner.h"
#include "gpu.h"

namespace hstu_trt::host {
namespace {

constexpr double kMostMicroseconds = 3.;
constexpr int kRounds = 41, kCalls = 200;  // calls per round: fewer than a stream's queue holds

struct Timing {
  double median, spread;  // microseconds, share of the median
};

Timing summary(std::vector<double> rounds) {
  std::sort(rounds.begin(), rounds.end());
  double const median = rounds[rounds.size() / 2];
  return {median, (rounds.back() - rounds.front()) / median};
}

// Host time of one call: the GPU is idle at the start of a round and is not waited for within.
template <class Call>
double round_time(Stream const& stream, Call&& call) {
  stream.wait();
  auto const begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  std::chrono::duration<double, std::micro> const taken = std::chrono::steady_clock::now() - begin;
  stream.wait();
  return taken.count() / kCalls;
}

void measure(Checks& checks, Creators const& creators, AttentionCase const& one) {
  AttentionProblem const problem(one, 51);
  AttentionRunner runner(creators, problem);
  Stream const stream;
  AttentionParams const params = problem.params(runner.out(), /*float_output=*/false, runner.workspace());
  std::vector<double> shell, bare;
  for (int round = 0; round < kRounds; ++round) {
    bare.push_back(round_time(stream, [&] { hstu_trt_launch_attention(&params, 0, stream); }));
    shell.push_back(round_time(stream, [&] { runner.enqueue(stream); }));
  }
  Timing const with = summary(shell), without = summary(bare);
  double const overhead = with.median - without.median;
  char detail[128];
  std::snprintf(detail, sizeof(detail), "%.2f us, bare launch %.2f us, overhead %.2f us", with.median, without.median,
                overhead);
  checks.check(overhead < kMostMicroseconds, "enqueue of " + one.name, detail);
  std::printf(
      "ROW {\"case\": \"%s\", \"median_us\": %.3f, \"spread\": %.3f, \"bare_us\": %.3f, \"bare_spread\": %.3f}\n",
      one.name.c_str(), with.median, with.spread, without.median, without.spread);
}

}  // namespace

void measure_overhead(Checks& checks, Creators const& creators) {
  AttentionCase one;
  one.dim = 128;
  one.users = {{64, 16, 64}, {30, 16, 30}};
  for (Type const type : {Type::kHALF, Type::kBF16, Type::kFP8}) {
    one.name = type == Type::kHALF ? "fp16" : type == Type::kBF16 ? "bf16" : "fp8";
    one.type = type;
    one.output = type == Type::kBF16 ? Type::kBF16 : Type::kHALF;
    measure(checks, creators, one);
  }
}

}  // namespace hstu_trt::host
