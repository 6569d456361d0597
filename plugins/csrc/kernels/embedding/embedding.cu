// SPDX-License-Identifier: Apache-2.0
// A gather bound by memory: each row is read by as many lanes as it has 16-byte pieces, a whole warp for wide rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "embedding.h"

namespace hstu_trt {
namespace {

constexpr int kWarpSize = 32;
constexpr int kBlockThreads = 256;
constexpr int kVectorBytes = 16;

// `kCount` neighbouring elements, moved as one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kVectorBytes ? sizeof(T) * kCount : kVectorBytes) Pack {
  T elements[kCount];
};

template <class Out, class T>
__device__ Out convert(T value) {
  return static_cast<Out>(static_cast<float>(value));
}

// First pack of the row that an id names, or nullptr if it names none.
template <class PackT, class Id>
__device__ PackT const* find_row(EmbeddingParams const& p, int64_t index, int packs) {
  EmbeddingTable const table = p.live_table ? *p.live_table : p.table;
  int64_t const row = static_cast<Id const*>(p.ids)[index];
  return row >= 0 && row < table.rows ? static_cast<PackT const*>(table.data) + row * packs : nullptr;
}

// `lanes` is a power of two: the threads that share a row.
template <class T, class Out, class Id, int kCount>
__global__ void __launch_bounds__(kBlockThreads) lookup_kernel(EmbeddingParams const p, int lanes) {
  int64_t const thread = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  int64_t const index = thread / lanes;
  if (index >= p.count) return;
  int const packs = p.dim / kCount;
  Pack<T, kCount> const* const from = find_row<Pack<T, kCount>, Id>(p, index, packs);
  auto* const to = static_cast<Pack<Out, kCount>*>(p.out) + index * packs;
#pragma unroll 4
  for (int i = static_cast<int>(thread % lanes); i < packs; i += lanes) {
    Pack<Out, kCount> result{};
    if (from) {
      Pack<T, kCount> const stored = from[i];
#pragma unroll
      for (int n = 0; n < kCount; ++n) result.elements[n] = convert<Out>(stored.elements[n]);
    }
    to[i] = result;
  }
}

template <class T, class Out, class Id, int kCount>
cudaError_t launch(EmbeddingParams const& p, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < p.dim / kCount) lanes *= 2;
  int64_t const blocks = (p.count * lanes + kBlockThreads - 1) / kBlockThreads;
  lookup_kernel<T, Out, Id, kCount><<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(p, lanes);
  return cudaGetLastError();
}

// Whether all rows of the table and of the output begin at a multiple of what a Pack is aligned to.
template <class T, class Out>
bool fits_vectors(EmbeddingParams const& p) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  auto const from = reinterpret_cast<uintptr_t>(p.live_table ? nullptr : p.table.data);
  auto const to = reinterpret_cast<uintptr_t>(p.out);
  return p.dim % kCount == 0 && from % kVectorBytes == 0 && to % alignof(Pack<Out, kCount>) == 0;
}

template <class T, class Out, class Id>
cudaError_t launch_rows(EmbeddingParams const& p, cudaStream_t stream) {
  if (fits_vectors<T, Out>(p)) return launch<T, Out, Id, kVectorBytes / sizeof(T)>(p, stream);
  return launch<T, Out, Id, 1>(p, stream);
}

template <class T, class Out>
cudaError_t launch_ids(EmbeddingParams const& p, cudaStream_t stream) {
  return p.wide_ids ? launch_rows<T, Out, int64_t>(p, stream) : launch_rows<T, Out, int32_t>(p, stream);
}

template <class T>
cudaError_t launch_output(EmbeddingParams const& p, cudaStream_t stream) {
  return p.output_type == DataType::kFloat32 ? launch_ids<T, float>(p, stream) : launch_ids<T, __half>(p, stream);
}

}  // namespace

char const* embedding_unsupported(EmbeddingParams const& p) noexcept {
  if (p.count < 0 || p.table.rows < 0) return "the number of ids and of rows must not be negative";
  if (p.dim < 1) return "dim must be at least 1";
  if (p.count > INT32_MAX) return "more than 2147483647 ids in one call";
  if (p.type == DataType::kFloat8E4M3) return "a table is fp32, fp16 or bf16";
  if (p.output_type != DataType::kFloat32 && p.output_type != DataType::kFloat16) return "the output is fp32 or fp16";
  if (p.count > 0 && !(p.ids && p.out)) return "ids or output are missing";
  if (!p.live_table && p.table.rows > 0 && !p.table.data) return "the table is missing";
  return nullptr;
}

cudaError_t launch_embedding_lookup(EmbeddingParams const& params, cudaStream_t stream) noexcept {
  if (embedding_unsupported(params)) return cudaErrorNotSupported;
  if (params.count == 0) return cudaSuccess;
  switch (params.type) {
    case DataType::kFloat32: return launch_output<float>(params, stream);
    case DataType::kFloat16: return launch_output<__half>(params, stream);
    case DataType::kBFloat16: return launch_output<__nv_bfloat16>(params, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace hstu_trt
