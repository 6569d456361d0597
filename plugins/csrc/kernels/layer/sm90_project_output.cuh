// SPDX-License-Identifier: Apache-2.0
// From the sums of a consumer to rows of the output: scaled, with the bias, in e4m3 or fp16.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "sm90_project_tiles.cuh"

namespace hstu_trt::project {

// Among four neighbouring lanes c: packets[n] is lane c's packet of block n; afterwards packets[n] is lane n's of block
// c.
__device__ __forceinline__ void transpose(uint32_t (&packets)[4]) {
  bool const odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t& kept = high ? packets[i + 2] : packets[i];
    uint32_t const sent = high ? packets[i] : packets[i + 2];
    uint32_t const got = __shfl_xor_sync(~0u, sent, 2);
    uint32_t const own = kept;
    packets[i] = high ? got : own;      // of the lower lanes
    packets[i + 2] = high ? own : got;  // of the upper lanes
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t const sent = odd ? packets[i] : packets[i + 1];
    uint32_t const got = __shfl_xor_sync(~0u, sent, 1);
    uint32_t const own = odd ? packets[i + 1] : packets[i];
    packets[i] = odd ? got : own;
    packets[i + 1] = odd ? own : got;
  }
}

__device__ __forceinline__ uint32_t pack_half(float2 pair) {
  __half2 const halves = __float22half2_rn(pair);
  return *reinterpret_cast<uint32_t const*>(&halves);
}

__device__ __forceinline__ uint32_t pack_fp8(float2 pair) {
  return __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
}

// Scale and bias of two neighbouring columns of a thread.
struct Columns {
  float2 scale, bias;

  __device__ Columns(SharedMemory const& memory, int block) {
    int const column = 8 * block + static_cast<int>(threadIdx.x) % 4 * 2;
    scale = *reinterpret_cast<float2 const*>(&memory.scale[column]);
    bias = *reinterpret_cast<float2 const*>(&memory.bias[column]);
  }

  // Of the sums of column block `block`, row g + 8 * half.
  __device__ float2 operator()(float const (&sums)[kColumns / 2], int block, int half) const {
    int const i = 4 * block + 2 * half;
    return {sums[i] * scale.x + bias.x, sums[i + 1] * scale.y + bias.y};
  }
};

// The rows g and g + 8 of a warp's 16, and which of them are there.
template <class T>
struct TwoRows {
  T* rows[2];
  bool exists[2];
};

// Stores a thread's sums in e4m3: lane c of four stores 8 elements of every fourth block.
__device__ __forceinline__ void store_fp8(float const (&sums)[kColumns / 2], SharedMemory const& memory,
                                          TwoRows<uint8_t> const& to) {
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    // Scales of later blocks are not to be read ahead: registers are short.
    asm volatile("" ::: "memory");
    uint32_t packets[2][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      Columns const columns(memory, 4 * group + n);
      packets[0][n] = pack_fp8(columns(sums, 4 * group + n, 0));
      packets[1][n] = pack_fp8(columns(sums, 4 * group + n, 1));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t (&four)[4] = packets[half];
      transpose(four);
      uint2 const bytes{four[0] | four[1] << 16, four[2] | four[3] << 16};
      if (to.exists[half]) *reinterpret_cast<uint2*>(to.rows[half] + 32 * group + 8 * (threadIdx.x % 4)) = bytes;
    }
  }
}

// The same in fp16: even lanes store 4 elements of one block, odd lanes of the next.
__device__ __forceinline__ void store_half(float const (&sums)[kColumns / 2], SharedMemory const& memory,
                                           TwoRows<__half> const& to) {
  bool const odd = threadIdx.x & 1;
#pragma unroll
  for (int block = 0; block < kColumns / 8; block += 2) {
    asm volatile("" ::: "memory");
    Columns const first(memory, block), second(memory, block + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const a = pack_half(first(sums, block, half)), b = pack_half(second(sums, block + 1, half));
      uint32_t const got = __shfl_xor_sync(~0u, odd ? a : b, 1);
      uint2 const four{odd ? got : a, odd ? b : got};
      if (to.exists[half]) *reinterpret_cast<uint2*>(to.rows[half] + 8 * (block + odd) + 2 * (threadIdx.x & 2)) = four;
    }
  }
}

}  // namespace hstu_trt::project
