// SPDX-License-Identifier: Apache-2.0
// extern "C" face of libhstu_trt_kernels.so. Every function may be called without a GPU but those that launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/attention/params.h"
#include "../kernels/embedding/params.h"

#define HSTU_TRT_API __attribute__((visibility("default")))

extern "C" {

// Name, offset and size in bytes of one field of a params struct: what a mirror of the struct is checked with.
struct HstuTrtField {
  char const* name;
  size_t offset;
  size_t size;
};

// Version of this face: it changes when a params struct or a function below does.
HSTU_TRT_API int32_t hstu_trt_abi_version(void);

// Compute capabilities in the library, as nvcc names them: "80,90a".
HSTU_TRT_API char const* hstu_trt_cuda_archs(void);

HSTU_TRT_API size_t hstu_trt_attention_params_size(void);

// Points `fields` at the fields of AttentionParams, in their order, and returns their number.
HSTU_TRT_API size_t hstu_trt_attention_params_fields(HstuTrtField const** fields);

// As in kernels/attention/attention.h; `kernel` is an AttentionKernel, `stream` a cudaStream_t. Launches return a
// cudaError_t.
HSTU_TRT_API char const* hstu_trt_attention_unsupported(hstu_trt::AttentionParams const* params, int32_t kernel,
                                                        int32_t capability);
HSTU_TRT_API size_t hstu_trt_attention_workspace_size(hstu_trt::AttentionParams const* params, int32_t kernel);
HSTU_TRT_API int32_t hstu_trt_launch_attention(hstu_trt::AttentionParams const* params, int32_t kernel, void* stream);

// As in kernels/attention/value_blocks.h.
HSTU_TRT_API int32_t hstu_trt_launch_pack_values(hstu_trt::AttentionParams const* params, void* blocks, void* stream);
HSTU_TRT_API int32_t hstu_trt_value_blocks(int32_t rows, int32_t users);

// Of EmbeddingParams and the structs in it, likewise; as in kernels/embedding/embedding.h.
HSTU_TRT_API size_t hstu_trt_embedding_params_size(void);
HSTU_TRT_API size_t hstu_trt_embedding_params_fields(HstuTrtField const** fields);
HSTU_TRT_API size_t hstu_trt_embedding_columns_size(void);
HSTU_TRT_API size_t hstu_trt_embedding_columns_fields(HstuTrtField const** fields);
HSTU_TRT_API size_t hstu_trt_embedding_table_size(void);
HSTU_TRT_API size_t hstu_trt_embedding_table_fields(HstuTrtField const** fields);
HSTU_TRT_API char const* hstu_trt_embedding_unsupported(hstu_trt::EmbeddingParams const* params);
HSTU_TRT_API int32_t hstu_trt_launch_embedding_lookup(hstu_trt::EmbeddingParams const* params, void* stream);
HSTU_TRT_API int32_t hstu_trt_launch_embedding_publish(hstu_trt::EmbeddingTable const** live_tables,
                                                       hstu_trt::EmbeddingTable const* tables, void* stream);

// Name and meaning of a cudaError_t.
HSTU_TRT_API char const* hstu_trt_error_name(int32_t error);
HSTU_TRT_API char const* hstu_trt_error_text(int32_t error);

}  // extern "C"
