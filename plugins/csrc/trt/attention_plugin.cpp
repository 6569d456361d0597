// SPDX-License-Identifier: Apache-2.0
#include "attention_plugin.h"

#include "../kernels/attention/attention.h"
#include "device.h"
#include "types.h"

namespace hstu_trt::trt {

using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

// The largest call of a profile. `desc.dims` may hold wildcards.
char const* read_largest(AttentionCall& call, AttentionAttributes const& attributes,
                         DynamicPluginTensorDesc const* inputs, int32_t count,
                         DynamicPluginTensorDesc const& output) noexcept {
  if (count > kAllInputs) return "there must be 7 to 15 inputs";
  PluginTensorDesc largest[kAllInputs];
  for (int32_t i = 0; i < count; ++i) largest[i] = {inputs[i].max, inputs[i].desc.type, inputs[i].desc.format, 1.f};
  char const* const fault =
      call.read(attributes, largest, count, {output.max, output.desc.type, output.desc.format, 1.f});
  if (!fault) call.bind_stand_ins();
  return fault;
}

char const* kernel_name(AttentionKernel kernel) {
  return kernel == AttentionKernel::kSm90 ? "sm90" : kernel == AttentionKernel::kSmxx ? "smxx" : "fp32";
}

// Says which kernel the largest call gets on this GPU, and warns where that is the plain one.
void log_kernel(AttentionParams const& params, int capability) noexcept {
  for (AttentionKernel const kernel : {AttentionKernel::kSm90, AttentionKernel::kSmxx}) {
    char const* const sentence = attention_unsupported(params, kernel, capability);
    if (!sentence) {
      log_verbose("HstuAttention: kernel %s at compute capability %d", kernel_name(kernel), capability);
      return;
    }
    log_verbose("HstuAttention: not kernel %s: %s", kernel_name(kernel), sentence);
  }
  char const* const sentence = attention_unsupported(params, AttentionKernel::kSmxx, capability);
  log_warning("HstuAttention: takes the plain fp32 kernel, which is slow, at compute capability %d: %s", capability,
              sentence);
}

}  // namespace

int32_t HstuAttention::getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                                          nvinfer1::DataType const* inputs, int32_t input_count) const noexcept {
  constexpr char kMethod[] = "getOutputDataTypes";
  if (output_count != 1) return answer(kMethod, "there is one output");
  if (input_count < kRequiredInputs) return answer(kMethod, "there must be 7 to 15 inputs");
  for (int32_t i = 0; i < kRequiredInputs; ++i) {
    auto const input = static_cast<AttentionInput>(i);
    if (!type_fits(input, inputs[i], inputs[0])) return answer(kMethod, type_fault(input));
  }
  outputs[0] = onnx_type(attributes_.output_type);
  return kOk;
}

int32_t HstuAttention::getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t,
                                       DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  constexpr char kMethod[] = "getOutputShapes";
  if (output_count != 1) return answer(kMethod, "there is one output");
  if (input_count < kRequiredInputs || input_count > kAllInputs) return answer(kMethod, "there must be 7 to 15 inputs");
  if (inputs[0].nbDims != 3 || inputs[2].nbDims != 3) {
    return answer(kMethod, "q, k, v and the output must have three axes: tokens, heads, dim");
  }
  outputs[0].nbDims = 3;
  outputs[0].d[0] = inputs[0].d[0];
  outputs[0].d[1] = inputs[0].d[1];
  outputs[0].d[2] = inputs[2].d[2];
  return kOk;
}

bool HstuAttention::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                              int32_t input_count, int32_t output_count) noexcept {
  if (output_count != 1) return supports("there is one output");
  return supports(format_fault(position, tensors, input_count));
}

// Looks at no tensor behind `position`: the builder has not chosen those yet.
char const* HstuAttention::format_fault(int32_t position, DynamicPluginTensorDesc const* tensors,
                                        int32_t input_count) const noexcept {
  if (input_count < kRequiredInputs || input_count > kAllInputs) return "there must be 7 to 15 inputs";
  if (position < 0 || position > input_count) return "there is no tensor at this position";
  nvinfer1::DataType const type = tensors[position].desc.type;
  if (tensors[position].desc.format != TensorFormat::kLINEAR) return "tensors must be linear";
  if (position == input_count) {
    return type == onnx_type(attributes_.output_type) ? nullptr : "the output's type is not output_type";
  }
  PluginTensorDesc inputs[kAllInputs];
  for (int32_t i = 0; i <= position; ++i) inputs[i] = tensors[i].desc;
  if (position >= kRequiredInputs && inputs[position].dims.nbDims < 1) return nullptr;
  AttentionInput input;
  if (!input_at(inputs, position, input_count, input)) return "the number of inputs fits no choice of optional ones";
  return type_fits(input, type, inputs[0].type) ? nullptr : type_fault(input);
}

int32_t HstuAttention::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                       DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept {
  constexpr char kMethod[] = "configurePlugin";
  if (output_count != 1) return answer(kMethod, "there is one output");
  AttentionCall call;
  if (char const* const fault = read_largest(call, attributes_, inputs, input_count, outputs[0])) {
    return answer(kMethod, fault);
  }
  int const capability = current_capability();
  if (char const* const sentence = attention_unsupported(call.params(), AttentionKernel::kAuto, capability)) {
    return answer(kMethod, sentence);
  }
  log_kernel(call.params(), capability);
  input_count_ = input_count;
  return kOk;
}

size_t HstuAttention::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                       DynamicPluginTensorDesc const* outputs, int32_t) const noexcept {
  AttentionCall call;
  char const* const fault = read_largest(call, attributes_, inputs, input_count, outputs[0]);
  return answer("getWorkspaceSize", fault) == kOk ? call.workspace_size() : 0;
}

int32_t HstuAttention::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count,
                                     PluginTensorDesc const* outputs, int32_t output_count) noexcept {
  constexpr char kMethod[] = "onShapeChange";
  if (output_count != 1) return answer(kMethod, "there is one output");
  AttentionCall call;
  if (char const* const fault = call.read(attributes_, inputs, input_count, outputs[0])) return answer(kMethod, fault);
  input_count_ = input_count;
  return kOk;
}

int32_t HstuAttention::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const* output_descs,
                               void const* const* inputs, void* const* outputs, void* workspace,
                               cudaStream_t stream) noexcept {
  constexpr char kMethod[] = "enqueue";
  AttentionCall call;
  if (char const* const fault = call.read(attributes_, input_descs, input_count_, output_descs[0])) {
    return answer(kMethod, fault);
  }
  call.bind(inputs, outputs[0], workspace, /*checked=*/building());
  cudaError_t error = call.needs_copy() ? launch_copy_offsets(call.offsets_copy(), stream) : cudaSuccess;
  if (error == cudaSuccess) error = launch_attention(call.params(), AttentionKernel::kAuto, stream);
  if (error == cudaErrorNotSupported) {
    char const* const sentence = attention_unsupported(call.params(), AttentionKernel::kAuto, current_capability());
    return answer(kMethod, sentence ? sentence : cudaGetErrorString(error));
  }
  return answer(kMethod, error == cudaSuccess ? nullptr : cudaGetErrorString(error));
}

}  // namespace hstu_trt::trt
