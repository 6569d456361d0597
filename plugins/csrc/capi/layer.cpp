// SPDX-License-Identifier: Apache-2.0
#include "layer.h"

#include <cuda_runtime_api.h>

#include <iterator>

#include "../kernels/layer/layer.h"
#include "fields.h"

namespace {

using hstu_trt::EncodeTokensParams;
using hstu_trt::GateParams;
using hstu_trt::LayerKernel;
using hstu_trt::NormRowsParams;
using hstu_trt::ProjectParams;
using hstu_trt::QuantiseRowsParams;
using hstu_trt::ScoresParams;
using hstu_trt::UserVectorsParams;

#define FIELD(name) HSTU_TRT_FIELD(NormRowsParams, name)
constexpr HstuTrtField kNormRowsFields[] = {
    FIELD(x),     FIELD(delta),    FIELD(sum),          FIELD(gain),       FIELD(bias),          FIELD(factor),
    FIELD(out),   FIELD(x_stride), FIELD(delta_stride), FIELD(sum_stride), FIELD(factor_stride), FIELD(rows),
    FIELD(width), FIELD(swish),    FIELD(eps)};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(GateParams, name)
constexpr HstuTrtField kGateFields[] = {
    FIELD(u),          FIELD(attention),        FIELD(gain), FIELD(bias),  FIELD(joined),
    FIELD(u_stride),   FIELD(attention_stride), FIELD(rows), FIELD(width), FIELD(heads),
    FIELD(group_norm), FIELD(keep_attention),   FIELD(eps)};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(QuantiseRowsParams, name)
constexpr HstuTrtField kQuantiseRowsFields[] = {FIELD(segments), FIELD(count)};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(EncodeTokensParams, name)
constexpr HstuTrtField kEncodeTokensFields[] = {
    FIELD(content),
    FIELD(gain),
    FIELD(bias),
    FIELD(extra),
    FIELD(actions_table),
    FIELD(actions),
    FIELD(contextual),
    FIELD(position_table),
    FIELD(time_table),
    FIELD(timestamps),
    FIELD(prefix_offsets),
    FIELD(candidate_offsets),
    FIELD(norm_gain),
    FIELD(norm_bias),
    FIELD(x),
    FIELD(normed),
    FIELD(action_masks),
    FIELD(action_count),
    FIELD(tokens),
    FIELD(prefix_tokens),
    FIELD(users),
    FIELD(slots),
    FIELD(width),
    FIELD(last_position),
    FIELD(last_bucket),
    FIELD(eps),
    FIELD(norm_eps),
};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(UserVectorsParams, name)
constexpr HstuTrtField kUserVectorsFields[] = {FIELD(x),          FIELD(gain),    FIELD(bias),     FIELD(time_weight),
                                               FIELD(timestamps), FIELD(users),   FIELD(items),    FIELD(item_gain),
                                               FIELD(item_bias),  FIELD(product), FIELD(x_stride), FIELD(rows),
                                               FIELD(width),      FIELD(kind),    FIELD(eps)};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(ScoresParams, name)
constexpr HstuTrtField kScoresFields[] = {FIELD(hidden),      FIELD(gain),   FIELD(bias),   FIELD(weight),
                                          FIELD(weight_bias), FIELD(scores), FIELD(stride), FIELD(rows),
                                          FIELD(width),       FIELD(tasks),  FIELD(binary), FIELD(eps)};
#undef FIELD

#define FIELD(name) HSTU_TRT_FIELD(ProjectParams, name)
constexpr HstuTrtField kProjectFields[] = {FIELD(x),      FIELD(weight), FIELD(column_scale), FIELD(bias),
                                           FIELD(outs),   FIELD(widths), FIELD(x_stride),     FIELD(rows),
                                           FIELD(inputs), FIELD(count)};
#undef FIELD

struct FieldList {
  HstuTrtField const* fields;
  size_t count;
  size_t params_size;
};

template <class Params, auto const& kFields>
constexpr FieldList list() {
  static_assert(hstu_trt::lists_every_field<Params>(kFields), "a list must have all fields in their order");
  return {kFields, std::size(kFields), sizeof(Params)};
}

FieldList list_of(int32_t kernel) {
  switch (static_cast<LayerKernel>(kernel)) {
    case LayerKernel::kNormRows: return list<NormRowsParams, kNormRowsFields>();
    case LayerKernel::kGate: return list<GateParams, kGateFields>();
    case LayerKernel::kQuantiseRows: return list<QuantiseRowsParams, kQuantiseRowsFields>();
    case LayerKernel::kEncodeTokens: return list<EncodeTokensParams, kEncodeTokensFields>();
    case LayerKernel::kUserVectors: return list<UserVectorsParams, kUserVectorsFields>();
    case LayerKernel::kScores: return list<ScoresParams, kScoresFields>();
    case LayerKernel::kProject: return list<ProjectParams, kProjectFields>();
  }
  return {nullptr, 0, 0};
}

// Calls f with the params of a kernel as what they are; `otherwise` for a number that there is not.
template <class Result, class F>
Result with_params(int32_t kernel, void const* params, Result otherwise, F const& f) {
  switch (static_cast<LayerKernel>(kernel)) {
    case LayerKernel::kNormRows: return f(*static_cast<NormRowsParams const*>(params));
    case LayerKernel::kGate: return f(*static_cast<GateParams const*>(params));
    case LayerKernel::kQuantiseRows: return f(*static_cast<QuantiseRowsParams const*>(params));
    case LayerKernel::kEncodeTokens: return f(*static_cast<EncodeTokensParams const*>(params));
    case LayerKernel::kUserVectors: return f(*static_cast<UserVectorsParams const*>(params));
    case LayerKernel::kScores: return f(*static_cast<ScoresParams const*>(params));
    case LayerKernel::kProject: return f(*static_cast<ProjectParams const*>(params));
  }
  return otherwise;
}

}  // namespace

size_t hstu_trt_layer_params_size(int32_t kernel) { return list_of(kernel).params_size; }

size_t hstu_trt_layer_params_fields(int32_t kernel, HstuTrtField const** fields) {
  FieldList const found = list_of(kernel);
  *fields = found.fields;
  return found.count;
}

char const* hstu_trt_layer_unsupported(int32_t kernel, void const* params) {
  char const* const unknown = "there is no such kernel";
  return with_params(kernel, params, unknown, [](auto const& typed) { return hstu_trt::unsupported(typed); });
}

int32_t hstu_trt_launch_layer(int32_t kernel, void const* params, void* stream) {
  return with_params(kernel, params, static_cast<int32_t>(cudaErrorNotSupported), [=](auto const& typed) {
    return static_cast<int32_t>(hstu_trt::launch(typed, static_cast<cudaStream_t>(stream)));
  });
}
