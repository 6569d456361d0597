// SPDX-License-Identifier: Apache-2.0
#include "embedding.h"
#include "launchers.h"

namespace hstu_trt {
namespace {

__global__ void latch_kernel(EmbeddingTable const* const* live_tables, EmbeddingTable const** latch) {
  *latch = *const_cast<EmbeddingTable const* volatile const*>(live_tables);
}

__global__ void publish_kernel(EmbeddingTable const** live_tables, EmbeddingTable const* tables) {
  *const_cast<EmbeddingTable const* volatile*>(live_tables) = tables;
}

bool is_quantised(DataType type) { return type == DataType::kInt8 || type == DataType::kFloat8E4M3; }

bool is_type(DataType type) { return type >= DataType::kFloat32 && type <= DataType::kInt8; }

bool is_power_of_two(int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

char const* table_unsupported(EmbeddingTable const& table, DataType type) {
  if (table.rows < 0 || table.hot_rows < 0 || table.cold_rows < 0) return "numbers of rows must not be negative";
  if ((table.hot_rows > 0 && !table.hot) || (table.cold_rows > 0 && !table.cold))
    return "rows of the table are missing";
  if (table.direct_rows < 0 || table.direct_rows > table.hot_rows) return "direct rows must be hot rows";
  bool const stored = table.hot_rows > 0 || table.cold_rows > 0;
  if (is_quantised(type) && stored && !table.scales) return "scales of the quantised rows are missing";
  if (table.hash < IdHash::kNone || table.hash > IdHash::kPermutation) return "the hash is none that the kernel knows";
  if (table.hash == IdHash::kPermutation && table.id_count > 0 && !table.row_of_id) return "the permutation is missing";
  if (table.default_row < kZeroRow) return "the default row must be a row, or -1 for zeros";
  if (!table.overlay_slots) return nullptr;
  if (!is_power_of_two(table.overlay_mask + 1)) return "an overlay's number of slots must be a power of two";
  if (!table.overlay || (is_quantised(type) && !table.overlay_scales))
    return "rows or scales of the overlay are missing";
  return nullptr;
}

char const* columns_unsupported(EmbeddingParams const& p, EmbeddingColumns const& c) {
  if (c.dim < 1) return "dim must be at least 1";
  if (c.first < 0 || c.first + static_cast<int64_t>(c.dim) > p.out_stride) return "columns lie outside of the output";
  if (!is_type(c.type)) return "a table is fp32, fp16, bf16, int8 or fp8";
  if (char const* const sentence = p.live_tables ? nullptr : table_unsupported(c.table, c.type)) return sentence;
  if (p.count > 0 && !c.ids) return "ids or output are missing";
  return nullptr;
}

cudaError_t launch_columns(EmbeddingParams const& params, DataType type, cudaStream_t stream) {
  switch (type) {
    case DataType::kFloat32: return lookup_fp32(params, stream);
    case DataType::kFloat16: return lookup_fp16(params, stream);
    case DataType::kBFloat16: return lookup_bf16(params, stream);
    case DataType::kFloat8E4M3: return lookup_fp8(params, stream);
    case DataType::kInt8: return lookup_int8(params, stream);
  }
  return cudaErrorNotSupported;
}

// The columns of that type alone.
EmbeddingParams select(EmbeddingParams const& params, DataType type) {
  EmbeddingParams selected = params;
  selected.column_count = 0;
  for (int i = 0; i < params.column_count; ++i) {
    if (params.columns[i].type == type) selected.columns[selected.column_count++] = params.columns[i];
  }
  return selected;
}

}  // namespace

char const* embedding_unsupported(EmbeddingParams const& p) noexcept {
  if (p.count < 0) return "the number of ids must not be negative";
  if (p.count > INT32_MAX) return "more than 2147483647 ids in one call";
  if (p.column_count < 1 || p.column_count > kMaxEmbeddingColumns) return "a call looks up in 1 to 8 tables";
  bool const out_type = p.output_type == DataType::kFloat32 || p.output_type == DataType::kFloat16 ||
                        p.output_type == DataType::kBFloat16;
  if (!out_type) return "the output is fp32, fp16 or bf16";
  if (p.policy < IdPolicy::kReject || p.policy > IdPolicy::kDefaultRow)
    return "the policy is none that the kernel knows";
  if (p.lengths && (p.padded_length < 1 || p.count % p.padded_length != 0)) {
    return "with lengths, the number of ids must be a multiple of the padded length";
  }
  if (p.latch && !p.live_tables) return "a latch is for live tables";
  for (int i = 0; i < p.column_count; ++i) {
    if (char const* const sentence = columns_unsupported(p, p.columns[i])) return sentence;
  }
  return p.count > 0 && !p.out ? "ids or output are missing" : nullptr;
}

cudaError_t launch_embedding_lookup(EmbeddingParams const& params, cudaStream_t stream) noexcept {
  if (embedding_unsupported(params)) return cudaErrorNotSupported;
  if (params.count == 0) return cudaSuccess;
  EmbeddingParams call = params;
  if (params.latch) {
    latch_kernel<<<1, 1, 0, stream>>>(params.live_tables, params.latch);
    call.live_tables = params.latch;
  }
  cudaError_t error = cudaGetLastError();
  for (int type = 0; type <= static_cast<int>(DataType::kInt8) && error == cudaSuccess; ++type) {
    EmbeddingParams const selected = select(call, static_cast<DataType>(type));
    if (selected.column_count > 0) error = launch_columns(selected, static_cast<DataType>(type), stream);
  }
  return error;
}

cudaError_t launch_embedding_publish(EmbeddingTable const** live_tables, EmbeddingTable const* tables,
                                     cudaStream_t stream) noexcept {
  publish_kernel<<<1, 1, 0, stream>>>(live_tables, tables);
  return cudaGetLastError();
}

}  // namespace hstu_trt
