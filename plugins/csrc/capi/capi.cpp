// SPDX-License-Identifier: Apache-2.0
#include "capi.h"

#include <cuda_runtime_api.h>

#include "../kernels/attention/attention.h"
#include "../kernels/attention/value_blocks.h"
#include "../kernels/embedding/embedding.h"
#include "fields.h"

namespace {

using hstu_trt::AttentionKernel;
using hstu_trt::AttentionParams;
using hstu_trt::EmbeddingColumns;
using hstu_trt::EmbeddingParams;
using hstu_trt::EmbeddingTable;
using hstu_trt::lists_every_field;

#define FIELD(name) HSTU_TRT_FIELD(AttentionParams, name)

constexpr HstuTrtField kFields[] = {
    FIELD(q),
    FIELD(k),
    FIELD(v),
    FIELD(out),
    FIELD(cached_k),
    FIELD(cached_v),
    FIELD(cached_offsets),
    FIELD(page_table),
    FIELD(query_offsets),
    FIELD(prefix_offsets),
    FIELD(candidate_offsets),
    FIELD(norm),
    FIELD(attn_scale),
    FIELD(q_scale),
    FIELD(k_scale),
    FIELD(v_scale),
    FIELD(position_bias),
    FIELD(time_bias),
    FIELD(query_timestamps),
    FIELD(key_timestamps),
    FIELD(workspace),
    FIELD(users),
    FIELD(heads),
    FIELD(qk_dim),
    FIELD(v_dim),
    FIELD(query_rows),
    FIELD(key_rows),
    FIELD(cached_rows),
    FIELD(page_size),
    FIELD(pages_per_user),
    FIELD(norm_count),
    FIELD(attn_scale_count),
    FIELD(scale_count),
    FIELD(position_bias_count),
    FIELD(time_bias_count),
    FIELD(type),
    FIELD(output_type),
    FIELD(alpha),
    FIELD(causal),
    FIELD(max_attn_len),
    FIELD(contextual_seq_len),
    FIELD(min_full_attn_seq_len),
    FIELD(candidate_group_size),
    FIELD(packed_values),
    FIELD(reuse_plan),
    FIELD(whole_items),
};

#undef FIELD
#define FIELD(name) HSTU_TRT_FIELD(EmbeddingParams, name)

constexpr HstuTrtField kEmbeddingFields[] = {
    FIELD(out),         FIELD(lengths),       FIELD(live_tables), FIELD(latch),        FIELD(count),
    FIELD(out_stride),  FIELD(padded_length), FIELD(padding_id),  FIELD(policy),       FIELD(has_padding),
    FIELD(output_type), FIELD(wide_ids),      FIELD(wide_status), FIELD(column_count), FIELD(columns),
};

#undef FIELD
#define FIELD(name) HSTU_TRT_FIELD(EmbeddingColumns, name)

constexpr HstuTrtField kEmbeddingColumnsFields[] = {
    FIELD(ids), FIELD(id_stride), FIELD(status), FIELD(bad_ids), FIELD(live_table),
    FIELD(dim), FIELD(first),     FIELD(type),   FIELD(table),   FIELD(status_stride),
};

#undef FIELD
#define FIELD(name) HSTU_TRT_FIELD(EmbeddingTable, name)

constexpr HstuTrtField kEmbeddingTableFields[] = {
    FIELD(hot),           FIELD(scales),       FIELD(direct_rows), FIELD(rows),        FIELD(hot_rows),
    FIELD(cold_rows),     FIELD(cold),         FIELD(row_of_id),   FIELD(overlay),     FIELD(overlay_scales),
    FIELD(overlay_slots), FIELD(overlay_mask), FIELD(id_count),    FIELD(default_row), FIELD(seed),
    FIELD(version),       FIELD(hash),         FIELD(reserved),
};

#undef FIELD

static_assert(lists_every_field<AttentionParams>(kFields), "kFields must list all fields in their order");
static_assert(lists_every_field<EmbeddingParams>(kEmbeddingFields), "kEmbeddingFields must, too");
static_assert(lists_every_field<EmbeddingColumns>(kEmbeddingColumnsFields), "kEmbeddingColumnsFields must, too");
static_assert(lists_every_field<EmbeddingTable>(kEmbeddingTableFields), "kEmbeddingTableFields must, too");

template <size_t kCount>
size_t point_at(HstuTrtField const (&list)[kCount], HstuTrtField const** fields) {
  *fields = list;
  return kCount;
}

}  // namespace

int32_t hstu_trt_abi_version(void) { return 3; }

char const* hstu_trt_cuda_archs(void) { return hstu_trt::attention_archs(); }

size_t hstu_trt_attention_params_size(void) { return sizeof(AttentionParams); }

size_t hstu_trt_attention_params_fields(HstuTrtField const** fields) { return point_at(kFields, fields); }

char const* hstu_trt_attention_unsupported(AttentionParams const* params, int32_t kernel, int32_t capability) {
  return hstu_trt::attention_unsupported(*params, static_cast<AttentionKernel>(kernel), capability);
}

size_t hstu_trt_attention_workspace_size(AttentionParams const* params, int32_t kernel) {
  return hstu_trt::attention_workspace_size(*params, static_cast<AttentionKernel>(kernel));
}

int32_t hstu_trt_launch_attention(AttentionParams const* params, int32_t kernel, void* stream) {
  return hstu_trt::launch_attention(*params, static_cast<AttentionKernel>(kernel), static_cast<cudaStream_t>(stream));
}

int32_t hstu_trt_launch_pack_values(AttentionParams const* params, void* blocks, void* stream) {
  return hstu_trt::launch_pack_values(*params, blocks, /*behind_plan=*/false, static_cast<cudaStream_t>(stream));
}

int32_t hstu_trt_value_blocks(int32_t rows, int32_t users) { return hstu_trt::value_blocks(rows, users); }

size_t hstu_trt_embedding_params_size(void) { return sizeof(EmbeddingParams); }

size_t hstu_trt_embedding_params_fields(HstuTrtField const** fields) { return point_at(kEmbeddingFields, fields); }

size_t hstu_trt_embedding_columns_size(void) { return sizeof(EmbeddingColumns); }

size_t hstu_trt_embedding_columns_fields(HstuTrtField const** fields) {
  return point_at(kEmbeddingColumnsFields, fields);
}

size_t hstu_trt_embedding_table_size(void) { return sizeof(EmbeddingTable); }

size_t hstu_trt_embedding_table_fields(HstuTrtField const** fields) { return point_at(kEmbeddingTableFields, fields); }

char const* hstu_trt_embedding_unsupported(EmbeddingParams const* params) {
  return hstu_trt::embedding_unsupported(*params);
}

int32_t hstu_trt_launch_embedding_lookup(EmbeddingParams const* params, void* stream) {
  return hstu_trt::launch_embedding_lookup(*params, static_cast<cudaStream_t>(stream));
}

int32_t hstu_trt_launch_embedding_publish(EmbeddingTable const** live_tables, EmbeddingTable const* tables,
                                          void* stream) {
  return hstu_trt::launch_embedding_publish(live_tables, tables, static_cast<cudaStream_t>(stream));
}

char const* hstu_trt_error_name(int32_t error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

char const* hstu_trt_error_text(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
