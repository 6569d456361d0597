// SPDX-License-Identifier: Apache-2.0
#include <deque>
#include <thread>

#include "../capi/capi.h"
#include "attention_runner.h"
#include "gpu.h"

namespace hstu_trt::host {
namespace {

std::vector<AttentionCase> cases() {
  std::vector<AttentionCase> list;
  for (int32_t const dim : {64, 128, 256}) {
    std::string const suffix = " d" + std::to_string(dim);
    list.push_back({"fp16" + suffix, Type::kHALF, Type::kHALF, 4, dim});
    list.push_back({"bf16" + suffix, Type::kBF16, Type::kBF16, 4, dim});
    list.push_back({"fp8" + suffix, Type::kFP8, Type::kHALF, 4, dim});
  }
  list.push_back({"fp32 d32", Type::kFLOAT, Type::kFLOAT, 3, 32});
  list.push_back({"fp16 to fp32, d40", Type::kHALF, Type::kFLOAT, 3, 40});
  auto const add = [&list](AttentionCase one, char const* name) -> AttentionCase& {
    one.name = name;
    return list.emplace_back(one);
  };
  AttentionCase const fp16 = list.front();
  add(fp16, "fp16, INT64 offsets").offsets = Type::kINT64;
  add(list[2], "fp8, INT64 offsets").offsets = Type::kINT64;
  add(fp16, "fp16, N per user").norm_per_user = true;
  add(fp16, "fp16, attn_scale").attn_scale = true;
  add(list[2], "fp8, attn_scale").attn_scale = true;
  add(fp16, "fp16, relative bias").bias = true;
  add(fp16, "fp16, groups of 4").candidate_group_size = 4;
  add(fp16, "fp16, candidates only").users = {{200, 60, 0}, {0, 5, 0}, {130, 0, 0}, {77, 33, 0}};
  AttentionCase& window = add(fp16, "fp16, window and context");
  window.max_attn_len = 40, window.contextual_seq_len = 3, window.min_full_attn_seq_len = 10;
  for (AttentionCase& one : list) {
    one.tolerance = one.type == Type::kFP8     ? 6e-2
                    : one.type == Type::kBF16  ? 6e-3
                    : one.type == Type::kFLOAT ? 0
                                               : 1e-3;
  }
  return list;
}

std::string text(double figure) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.2e", figure);
  return digits;
}

// Against the fp32 kernel, and bit by bit against the bare launch.
void check_case(Checks& checks, Creators const& creators, AttentionCase const& one) {
  AttentionProblem const problem(one, 7);
  AttentionRunner runner(creators, problem);
  Stream const stream;
  std::vector<float> const result = runner.run(stream);
  double const error = relative_l2(result, problem.oracle());
  checks.check(error <= one.tolerance, one.name + ": against the fp32 kernel", text(error));
  Buffer const out(problem.output_bytes());
  Buffer const workspace(size_t{64} << 20);
  AttentionParams const params = problem.params(out.data(), /*float_output=*/false, workspace.data());
  must(static_cast<cudaError_t>(hstu_trt_launch_attention(&params, 0, stream)));
  stream.wait();
  checks.check(download(out, one.output) == result, one.name + ": the bits of the bare launch");
}

// Other lengths within the same bounds; the graph was captured with the first.
void check_graph(Checks& checks, Creators const& creators, AttentionCase const& one) {
  AttentionProblem problem(one, 11);
  AttentionRunner runner(creators, problem), eager(creators, problem);
  Graph graph([&](cudaStream_t stream) { must(runner.enqueue(stream), "enqueue fails under capture"); });
  Stream const stream;
  std::vector<std::vector<User>> const lengths = {
      one.users, {{90, 10, 90}, {40, 60, 40}, {0, 0, 0}, {150, 20, 150}}, {{0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {7, 1, 7}}};
  bool good = true;
  for (std::vector<User> const& users : lengths) {
    problem.set_users(users);
    runner.clear();
    must(cudaDeviceSynchronize());
    graph.replay();
    good =
        good && runner.result() == eager.run(stream) && relative_l2(runner.result(), problem.oracle()) <= one.tolerance;
  }
  checks.check(good, one.name + ": a CUDA graph, replayed with other lengths");
}

// Contexts of one engine at work at once.
void check_streams(Checks& checks, Creators const& creators, AttentionCase const& one) {
  constexpr int kContexts = 4, kRounds = 20;
  std::deque<AttentionProblem> problems;
  std::deque<AttentionRunner> runners;
  std::deque<Stream> streams;
  std::vector<std::vector<float>> alone;
  for (unsigned i = 0; i < kContexts; ++i) {
    problems.emplace_back(one, 20 + i);
    runners.emplace_back(creators, problems.back());
    alone.push_back(runners.back().run(streams.emplace_back()));
  }
  bool good = true;
  for (int round = 0; round < kRounds; ++round) {
    for (AttentionRunner& runner : runners) runner.clear();
    must(cudaDeviceSynchronize());
    for (size_t i = 0; i < kContexts; ++i) good = runners[i].enqueue(streams[i]) && good;
    for (size_t i = 0; i < kContexts; ++i) streams[i].wait();
    for (size_t i = 0; i < kContexts; ++i) good = good && runners[i].result() == alone[i];
  }
  checks.check(good, one.name + ": 4 contexts on 4 streams, " + std::to_string(kRounds) + " rounds");
}

void check_threads(Checks& checks, Creators const& creators, AttentionCase const& one) {
  constexpr unsigned kThreads = 8;
  constexpr int kRounds = 25;
  AttentionProblem const problem(one, 31);
  Stream const stream;
  std::vector<float> const alone = AttentionRunner(creators, problem).run(stream);
  std::vector<int> good(kThreads, 0);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      Stream const own;
      AttentionRunner runner(creators, problem);
      for (int round = 0; round < kRounds; ++round) {
        good[i] += runner.enqueue(own);
        own.wait();
      }
      if (runner.result() != alone) good[i] = 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  checks.check(good == std::vector<int>(kThreads, kRounds), one.name + ": 8 threads with a clone each");
}

// As when an engine is built (TensorRT makes the offsets up), or when a request brings INT64 ones that lie.
void check_made_up_offsets(Checks& checks, Creators const& creators, AttentionCase const& one, TensorRTPhase phase) {
  AttentionProblem problem(one, 41);
  AttentionRunner runner(creators, problem, phase);
  Stream const stream;
  std::vector<float> const good = runner.run(stream);
  bool const same = relative_l2(good, problem.oracle()) <= one.tolerance;
  problem.scramble_offsets();
  std::vector<float> const result = runner.run(stream);
  bool const untouched = result == std::vector<float>(result.size(), 0.f);
  char const* const what = phase == TensorRTPhase::kBUILD ? ", while an engine is built" : "";
  checks.check(same && untouched, one.name + what + ": offsets that make no sense count as none");
}

}  // namespace

void run_attention(Checks& checks, Creators const& creators) {
  std::vector<AttentionCase> const list = cases();
  for (AttentionCase const& one : list) check_case(checks, creators, one);
  AttentionCase const fp16 = list[3], fp8 = list[5];
  AttentionCase wide = fp16;
  wide.name = "fp16, INT64 offsets";
  wide.offsets = Type::kINT64;
  for (AttentionCase const& one : {fp16, fp8, wide}) {
    check_graph(checks, creators, one);
    check_streams(checks, creators, one);
    check_threads(checks, creators, one);
  }
  check_made_up_offsets(checks, creators, wide, TensorRTPhase::kRUNTIME);
  check_made_up_offsets(checks, creators, fp16, TensorRTPhase::kBUILD);
  check_made_up_offsets(checks, creators, fp8, TensorRTPhase::kBUILD);
}

}  // namespace hstu_trt::host
