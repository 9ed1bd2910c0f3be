// Warpgroup matrix products of two FP8 operands in shared memory: d[64, n] += a[64, 32] b[n, 32]^T.
// PTX ISA, section 9.7.15. The operand lists are long because a wgmma names every register it adds
// to.
#pragma once

#include <cstdint>

namespace jfp4 {

#define JFP4_NAMES_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JFP4_NAMES_80                                                              \
  JFP4_NAMES_64 ", "                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define JFP4_NAMES_96                                                              \
  JFP4_NAMES_80 ", "                                                               \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JFP4_NAMES_128                                                                             \
  JFP4_NAMES_96 ", "                                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define JFP4_SUMS_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),  \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JFP4_SUMS_64                                                                  \
  JFP4_SUMS_8(0), JFP4_SUMS_8(8), JFP4_SUMS_8(16), JFP4_SUMS_8(24), JFP4_SUMS_8(32),  \
      JFP4_SUMS_8(40), JFP4_SUMS_8(48), JFP4_SUMS_8(56)
#define JFP4_SUMS_80 JFP4_SUMS_64, JFP4_SUMS_8(64), JFP4_SUMS_8(72)
#define JFP4_SUMS_96 JFP4_SUMS_80, JFP4_SUMS_8(80), JFP4_SUMS_8(88)
#define JFP4_SUMS_128                                                                 \
  JFP4_SUMS_96, JFP4_SUMS_8(96), JFP4_SUMS_8(104), JFP4_SUMS_8(112), JFP4_SUMS_8(120)

// COUNT is how many sums a thread has; A, B and ACCUMULATE are the numbers of the operands after
// them.
#define JFP4_WGMMA(N, COUNT, A, B, ACCUMULATE, A_TYPE, B_TYPE)                                    \
  asm volatile(                                                                                   \
      "{\n\t.reg .pred accumulate;\n\t"                                                           \
      "setp.ne.b32 accumulate, " ACCUMULATE ", 0;\n\t"                                            \
      "wgmma.mma_async.sync.aligned.m64n" N "k32.f32." A_TYPE "." B_TYPE " {" JFP4_NAMES_##COUNT  \
      "}, " A ", " B ", accumulate, 1, 1;\n\t}"                                                   \
      : JFP4_SUMS_##COUNT                                                                         \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define JFP4_WGMMA_OF_TYPES(N, COUNT, A, B, ACCUMULATE)     \
  if constexpr (kAE5M2) {                                   \
    JFP4_WGMMA(N, COUNT, A, B, ACCUMULATE, "e5m2", "e4m3"); \
  } else if constexpr (kBE5M2) {                            \
    JFP4_WGMMA(N, COUNT, A, B, ACCUMULATE, "e4m3", "e5m2"); \
  } else {                                                  \
    JFP4_WGMMA(N, COUNT, A, B, ACCUMULATE, "e4m3", "e4m3"); \
  }

// Adds to the first kN / 2 sums of d, or with `accumulate` false overwrites them. The operands are
// descriptors (hopper.cuh); a row of d lies in the four lanes lane / 4 of a warp, register
// 4 j + 2 h + c holding row lane / 4 + 8 h and column 8 j + 2 (lane % 4) + c.
template <int kN, bool kAE5M2, bool kBE5M2, int kSums>
__device__ __forceinline__ void Wgmma(float (&d)[kSums], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN <= 2 * kSums);
  static_assert((kN == 128 || kN == 160 || kN == 192 || kN == 256) && !(kAE5M2 && kBE5M2));
  if constexpr (kN == 128) {
    JFP4_WGMMA_OF_TYPES("128", 64, "%64", "%65", "%66");
  } else if constexpr (kN == 160) {
    JFP4_WGMMA_OF_TYPES("160", 80, "%80", "%81", "%82");
  } else if constexpr (kN == 192) {
    JFP4_WGMMA_OF_TYPES("192", 96, "%96", "%97", "%98");
  } else {
    JFP4_WGMMA_OF_TYPES("256", 128, "%128", "%129", "%130");
  }
}

#undef JFP4_WGMMA_OF_TYPES
#undef JFP4_WGMMA
#undef JFP4_SUMS_128
#undef JFP4_SUMS_96
#undef JFP4_SUMS_80
#undef JFP4_SUMS_64
#undef JFP4_SUMS_8
#undef JFP4_NAMES_128
#undef JFP4_NAMES_96
#undef JFP4_NAMES_80
#undef JFP4_NAMES_64

}  // namespace jfp4
