// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products (wgmma): D[64, N] += A[64, K] B[K, N], D in fp32 registers, B in shared memory, A in shared
// memory or registers. K is 32 bytes: 16 halves or 32 fp8. PTX ISA, chapter "Asynchronous Warpgroup Level Matrix
// Instructions".
//
// Thread t of a warpgroup, with warp = t / 32, g = t % 32 / 4, c = t % 4, holds in D: rows 16 * warp + g (registers
// 4j, 4j + 1) and + 8 (registers 4j + 2, 4j + 3), columns 8j + 2c and + 1.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace hstu_trt {

// Rows of 128 or 64 bytes, swizzled by the copy engine in groups of 8 rows.
enum class Swizzle : uint32_t { k128 = 1, k64 = 2 };

// An operand in shared memory: the two halves of its descriptor.
struct SharedOperand {
  uint32_t low, high;
};

// `group_bytes`: from 8 rows to the next 8. `panel_bytes`: from one 128-byte panel to the next, for operands stored
// along N (values); along K each panel has an operand of its own.
__device__ __forceinline__ SharedOperand shared_operand(uint32_t address, Swizzle swizzle, uint32_t group_bytes,
                                                        uint32_t panel_bytes = 16) {
  return {(address & 0x3FFFF) >> 4 | panel_bytes >> 4 << 16, group_bytes >> 4 | static_cast<uint32_t>(swizzle) << 30};
}

// Moves an operand by `bytes`, a multiple of 16.
__device__ __forceinline__ SharedOperand operand_at(SharedOperand operand, uint32_t bytes) {
  return {operand.low + (bytes >> 4), operand.high};
}

// Registers written before this may be read by products after it.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of registers that products in flight use.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kRows, int kColumns>
__device__ __forceinline__ void pin(uint32_t (&registers)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// clang-format off
#define HSTU_REGISTERS_32  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HSTU_REGISTERS_40 HSTU_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define HSTU_REGISTERS_48 HSTU_REGISTERS_40 ", " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define HSTU_REGISTERS_64 HSTU_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HSTU_REGISTERS_128 HSTU_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HSTU_OUT8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HSTU_OUT32(d, i) HSTU_OUT8(d, i), HSTU_OUT8(d, i + 8), HSTU_OUT8(d, i + 16), HSTU_OUT8(d, i + 24)
#define HSTU_OUTS_32(d) HSTU_OUT32(d, 0)
#define HSTU_OUTS_40(d) HSTU_OUT32(d, 0), HSTU_OUT8(d, 32)
#define HSTU_OUTS_48(d) HSTU_OUTS_40(d), HSTU_OUT8(d, 40)
#define HSTU_OUTS_64(d) HSTU_OUT32(d, 0), HSTU_OUT32(d, 32)
#define HSTU_OUTS_128(d) HSTU_OUTS_64(d), HSTU_OUT32(d, 64), HSTU_OUT32(d, 96)

// Wgmma<Element, N>: `both` takes A from shared memory and B stored along K, `left` takes A from registers and B along
// K, `left_rows` the same with B stored along N (halves only). The first product of a sum passes add = false.
// HSTU_WGMMA: registers of D, then the numbers of the operands behind them.
template <class Element, int kN>
struct Wgmma;

#define HSTU_WGMMA_LEFT(name, kD, kShape, kTypes, kEnd, a, b, c, e, f, g, h)                                           \
    __device__ static __forceinline__ void name(float (&d)[kD], uint32_t const (&left)[4], SharedOperand right,        \
                                                bool add = true) {                                                     \
      asm volatile("{.reg .pred p; .reg .b64 r; setp.ne.b32 p, %" #h ", 0; mov.b64 r, {%" #f ", %" #g "};\n"           \
                   "wgmma.mma_async.sync.aligned." kShape ".f32." kTypes " {" HSTU_REGISTERS_##kD "}, "                \
                   "{%" #a ", %" #b ", %" #c ", %" #e "}, r, p, 1, 1" kEnd ";}\n"                                      \
                   : HSTU_OUTS_##kD(d)                                                                                 \
                   : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right.low), "r"(right.high),          \
                     "r"(static_cast<int>(add)));                                                                      \
    }
#define HSTU_WGMMA(Element, kN, kD, kShape, kTypes, kBothEnd, kLeftEnd, kRowsEnd, a, b, c, e, f, g, h)                 \
  template <>                                                                                                          \
  struct Wgmma<Element, kN> {                                                                                          \
    __device__ static __forceinline__ void both(float (&d)[kD], SharedOperand left, SharedOperand right, bool add) {   \
      asm volatile("{.reg .pred p; .reg .b64 l, r; setp.ne.b32 p, %" #f ", 0;\n"                                       \
                   "mov.b64 l, {%" #a ", %" #b "}; mov.b64 r, {%" #c ", %" #e "};\n"                                   \
                   "wgmma.mma_async.sync.aligned." kShape ".f32." kTypes " {" HSTU_REGISTERS_##kD "}, "                \
                   "l, r, p, 1, 1" kBothEnd ";}\n"                                                                     \
                   : HSTU_OUTS_##kD(d)                                                                                 \
                   : "r"(left.low), "r"(left.high), "r"(right.low), "r"(right.high), "r"(static_cast<int>(add)));      \
    }                                                                                                                  \
    HSTU_WGMMA_LEFT(left, kD, kShape, kTypes, kLeftEnd, a, b, c, e, f, g, h)                                           \
    HSTU_WGMMA_LEFT(left_rows, kD, kShape, kTypes, kRowsEnd, a, b, c, e, f, g, h)                                      \
  };

HSTU_WGMMA(__half, 64, 32, "m64n64k16", "f16.f16", ", 0, 0", ", 0", ", 1", 32, 33, 34, 35, 36, 37, 38)
HSTU_WGMMA(__half, 80, 40, "m64n80k16", "f16.f16", ", 0, 0", ", 0", ", 1", 40, 41, 42, 43, 44, 45, 46)
HSTU_WGMMA(__half, 96, 48, "m64n96k16", "f16.f16", ", 0, 0", ", 0", ", 1", 48, 49, 50, 51, 52, 53, 54)
HSTU_WGMMA(__half, 128, 64, "m64n128k16", "f16.f16", ", 0, 0", ", 0", ", 1", 64, 65, 66, 67, 68, 69, 70)
HSTU_WGMMA(__half, 256, 128, "m64n256k16", "f16.f16", ", 0, 0", ", 0", ", 1", 128, 129, 130, 131, 132, 133, 134)
HSTU_WGMMA(__nv_bfloat16, 64, 32, "m64n64k16", "bf16.bf16", ", 0, 0", ", 0", ", 1", 32, 33, 34, 35, 36, 37, 38)
HSTU_WGMMA(__nv_bfloat16, 80, 40, "m64n80k16", "bf16.bf16", ", 0, 0", ", 0", ", 1", 40, 41, 42, 43, 44, 45, 46)
HSTU_WGMMA(__nv_bfloat16, 96, 48, "m64n96k16", "bf16.bf16", ", 0, 0", ", 0", ", 1", 48, 49, 50, 51, 52, 53, 54)
HSTU_WGMMA(__nv_bfloat16, 128, 64, "m64n128k16", "bf16.bf16", ", 0, 0", ", 0", ", 1", 64, 65, 66, 67, 68, 69, 70)
HSTU_WGMMA(__nv_bfloat16, 256, 128, "m64n256k16", "bf16.bf16", ", 0, 0", ", 0", ", 1",
           128, 129, 130, 131, 132, 133, 134)
HSTU_WGMMA(__nv_fp8_e4m3, 64, 32, "m64n64k32", "e4m3.e4m3", "", "", "", 32, 33, 34, 35, 36, 37, 38)
HSTU_WGMMA(__nv_fp8_e4m3, 128, 64, "m64n128k32", "e4m3.e4m3", "", "", "", 64, 65, 66, 67, 68, 69, 70)
HSTU_WGMMA(__nv_fp8_e4m3, 256, 128, "m64n256k32", "e4m3.e4m3", "", "", "", 128, 129, 130, 131, 132, 133, 134)

#undef HSTU_WGMMA
#undef HSTU_WGMMA_LEFT
#undef HSTU_OUTS_128
#undef HSTU_OUTS_64
#undef HSTU_OUTS_48
#undef HSTU_OUTS_40
#undef HSTU_OUTS_32
#undef HSTU_OUT32
#undef HSTU_OUT8
#undef HSTU_REGISTERS_128
#undef HSTU_REGISTERS_64
#undef HSTU_REGISTERS_48
#undef HSTU_REGISTERS_40
#undef HSTU_REGISTERS_32
// clang-format on

}  // namespace hstu_trt
