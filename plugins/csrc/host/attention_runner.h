// SPDX-License-Identifier: Apache-2.0
// An execution context in small: a plugin that was built, serialised, created again and attached, with its workspace.
#pragma once

#include "attention_problem.h"
#include "creators.h"
#include "handles.h"

namespace hstu_trt::host {

class AttentionRunner {
 public:
  AttentionRunner(Creators const& creators, AttentionProblem const& problem,
                  TensorRTPhase phase = TensorRTPhase::kRUNTIME)
      : problem_(problem), out_(problem.output_bytes()) {
    PluginHandle const built = create(*creators.attention, problem.fields(), TensorRTPhase::kBUILD);
    must(static_cast<bool>(built), "createPlugin refuses what it is to be checked with");
    std::vector<DynamicPluginTensorDesc> const ins = dynamic(problem.inputs());
    DynamicPluginTensorDesc const out = dynamic(problem.output());
    auto const count = static_cast<int32_t>(ins.size());
    must(built.build().configurePlugin(ins.data(), count, &out, 1) == 0, "configurePlugin refuses");
    workspace_ = Buffer(built.build().getWorkspaceSize(ins.data(), count, &out, 1));
    PluginHandle const engine(creators.attention->createPlugin("layer", built.runtime().getFieldsToSerialize(), phase));
    must(static_cast<bool>(engine), "createPlugin refuses what it serialised");
    plugin_ = PluginHandle(engine.runtime().attachToContext(nullptr));
    must(static_cast<bool>(plugin_), "attachToContext refuses");
    must(plugin_.runtime().onShapeChange(problem.inputs().data(), count, &problem.output(), 1) == 0,
         "onShapeChange refuses");
    addresses_ = problem.addresses();
  }

  bool enqueue(cudaStream_t stream) {
    void* const out = out_.data();
    return plugin_.runtime().enqueue(problem_.inputs().data(), &problem_.output(), addresses_.data(), &out,
                                     workspace_.data(), stream) == 0;
  }

  // Enqueues on `stream` and waits.
  std::vector<float> run(Stream const& stream) {
    out_.clear();
    must(cudaDeviceSynchronize());
    must(enqueue(stream), "enqueue failed");
    stream.wait();
    return result();
  }

  std::vector<float> result() const { return download(out_, problem_.output().type); }
  void clear() { out_.clear(); }
  void* workspace() const { return workspace_.data(); }
  void* out() const { return out_.data(); }

 private:
  AttentionProblem const& problem_;
  Buffer out_, workspace_;
  PluginHandle plugin_;
  std::vector<void const*> addresses_;
};

}  // namespace hstu_trt::host
