// Warpgroup matrix products of two FP8 operands in shared memory: d[64, n] += a[64, 32] b[n, 32]^T.
// PTX ISA, section 9.7.15. The operand lists are long because a wgmma names every register it adds
// to.
#pragma once

#include <cstdint>

namespace jfp4 {

#define JFP4_WGMMA(A_TYPE, B_TYPE)                                                                 \
  asm volatile(                                                                                    \
      "{\n\t.reg .pred accumulate;\n\t"                                                            \
      "setp.ne.b32 accumulate, %66, 0;\n\t"                                                        \
      "wgmma.mma_async.sync.aligned.m64n128k32.f32." A_TYPE "." B_TYPE                             \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "            \
      "}, %64, %65, accumulate, 1, 1;\n\t}"                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// `accumulate` false overwrites d. The operands are descriptors (hopper.cuh); a row of d lies in
// the four lanes lane / 4 of a warp, register 4 j + 2 h + c holding row lane / 4 + 8 h and column
// 8 j + 2 (lane % 4) + c.
template <int kN, bool kAE5M2, bool kBE5M2>
__device__ __forceinline__ void Wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 128 && !(kAE5M2 && kBE5M2));
  if constexpr (kAE5M2) {
    JFP4_WGMMA("e5m2", "e4m3");
  } else if constexpr (kBE5M2) {
    JFP4_WGMMA("e4m3", "e5m2");
  } else {
    JFP4_WGMMA("e4m3", "e4m3");
  }
}

#undef JFP4_WGMMA

}  // namespace jfp4
