// SPDX-License-Identifier: Apache-2.0
// Transposes fp8 values into value blocks. One CTA packs 128 keys of one head through shared memory, 128 columns at a
// time; memory is read in 32-byte pieces of rows and written in whole lines.
#include <cstdint>

#include "../common/ptx.cuh"
#include "value_blocks.h"

namespace hstu_trt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 128;
constexpr int kColumnWords = kColumns / 4;
constexpr int kSlotWords = kValueBlockKeys / 4;
// One word more than a row of slots holds: eight columns by four words fall into 32 banks.
constexpr int kPitch = kSlotWords + 1;

// Rows of one value block.
struct BlockRows {
  int first;  // in v
  int count;  // 0: the block belongs to nobody
};

// Finds the user of block `block` of a section, which begins at row `section_row` of v. All threads take part.
__device__ BlockRows find_rows(int32_t const* offsets, int users, int section_row, int block) {
  __shared__ BlockRows rows;
  if (threadIdx.x == 0) rows = {0, 0};
  __syncthreads();
  for (int user = threadIdx.x; user < users; user += kThreads) {
    int const begin = offsets[user];
    int const skipped = (block - first_value_block(begin, user)) * kValueBlockKeys;
    int const left = offsets[user + 1] - begin - skipped;
    if (skipped >= 0 && left > 0) rows = {section_row + begin + skipped, min(left, kValueBlockKeys)};
  }
  __syncthreads();
  return rows;
}

// words[i] holds four columns of one key; afterwards words[j] holds column j of four keys.
__device__ void transpose_bytes(uint32_t (&words)[4]) {
  uint32_t const low01 = __byte_perm(words[0], words[1], 0x5140), high01 = __byte_perm(words[0], words[1], 0x7362);
  uint32_t const low23 = __byte_perm(words[2], words[3], 0x5140), high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

// Columns [first_column, + kColumns) of one value block of one head.
__device__ void pack_columns(AttentionParams const& p, BlockRows rows, int head, int first_column, uint8_t* blocks,
                             uint32_t (&tile)[kColumns * kPitch]) {
  // A warp reads four keys of a slot word for eight words of columns and four such slot words: 16 keys, 32 columns.
  int const warp = threadIdx.x / 32, column_lane = threadIdx.x % 8, slot_lane = threadIdx.x % 32 / 8;
  uint8_t const* const values =
      static_cast<uint8_t const*>(p.v.data) + rows.first * p.v.row_stride + head * p.v.head_stride;
  constexpr int kUnits = (kValueBlockKeys / 16) * (kColumnWords / 8) / kWarps;
  uint32_t words[kUnits][4];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    int const unit = warp + i * kWarps;
    int const column = first_column + (unit % (kColumnWords / 8) * 8 + column_lane) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int const key = unit / (kColumnWords / 8) * 16 + 2 * slot_lane + (j < 2 ? j : 8 + j - 2);
      bool const exists = key < rows.count && column < p.v_dim;
      words[i][j] = exists ? __ldg(reinterpret_cast<uint32_t const*>(values + key * p.v.row_stride + column)) : 0u;
    }
  }
  // Others may still read the columns before these.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    int const unit = warp + i * kWarps;
    int const column = (unit % (kColumnWords / 8) * 8 + column_lane) * 4;
    transpose_bytes(words[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      tile[(column + j) * kPitch + unit / (kColumnWords / 8) * 4 + slot_lane] = words[i][j];
    }
  }
  __syncthreads();

  int const columns = min(kColumns, p.v_dim - first_column);
  int64_t const head_block = static_cast<int64_t>(blockIdx.x) * p.heads + head;
  uint32_t* const out = reinterpret_cast<uint32_t*>(blocks + (head_block * p.v_dim + first_column) * kValueBlockKeys);
#pragma unroll 4
  for (int column = warp; column < columns; column += kWarps) {
    out[column * kSlotWords + threadIdx.x % 32] = tile[column * kPitch + threadIdx.x % 32];
  }
}

__global__ void __launch_bounds__(kThreads) pack_values(AttentionParams const p, uint8_t* blocks) {
  __shared__ uint32_t tile[kColumns * kPitch];
  allow_next_kernel();
  int const section_blocks = value_blocks(p.key_rows, p.users);
  bool const candidates = static_cast<int>(blockIdx.x) >= section_blocks;
  BlockRows const rows =
      find_rows(candidates ? p.candidate_offsets : p.prefix_offsets, p.users,
                candidates ? p.prefix_offsets[p.users] : 0, blockIdx.x - (candidates ? section_blocks : 0));
  if (rows.count > 0) {
    for (int column = 0; column < p.v_dim; column += kColumns) {
      pack_columns(p, rows, blockIdx.y, column, blocks, tile);
    }
  }
  // Who waits for this kernel relies on the one before it as well.
  wait_for_previous_kernel();
}

}  // namespace

cudaError_t launch_pack_values(AttentionParams const& params, void* blocks, bool behind_plan,
                               cudaStream_t stream) noexcept {
  // Values are read four columns at a time.
  int64_t const strides = params.v.row_stride | params.v.head_stride | params.v_dim;
  if (params.type != DataType::kFloat8E4M3 || (strides | reinterpret_cast<intptr_t>(params.v.data)) % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  if (params.users == 0) return cudaSuccess;
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(2 * value_blocks(params.key_rows, params.users)), static_cast<unsigned>(params.heads));
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = behind_plan ? 1 : 0;
  return cudaLaunchKernelEx(&config, pack_values, params, static_cast<uint8_t*>(blocks));
}

}  // namespace hstu_trt
