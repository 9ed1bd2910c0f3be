#include "cuda_ffi/host/tiles.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define JFP4_X86 1
#endif

namespace jfp4::host {
namespace {

void IntegerTilePortable(const uint8_t* a, const int8_t* b, int64_t k, int64_t, int32_t* c,
                         int64_t stride) {
  for (int64_t i = 0; i < kIntegerRows; ++i) {
    for (int64_t j = 0; j < kIntegerCols; ++j) {
      int32_t sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += a[i * k + p] * b[j * k + p];
      c[i * stride + j] = sum;
    }
  }
}

void FloatTilePortable(const float* a, const float* b, int64_t k, float* c, int64_t stride) {
  float sums[kFloatRows][kFloatCols] = {};
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t i = 0; i < kFloatRows; ++i) {
      for (int64_t j = 0; j < kFloatCols; ++j) {
        sums[i][j] += a[p * kFloatRows + i] * b[p * kFloatCols + j];
      }
    }
  }
  for (int64_t i = 0; i < kFloatRows; ++i) {
    for (int64_t j = 0; j < kFloatCols; ++j) c[i * stride + j] += sums[i][j];
  }
}

#ifdef JFP4_X86

// The loops over a tile are unrolled, every one of them, for its sums to stay in registers.
#define JFP4_UNROLL _Pragma("GCC unroll 8")

__attribute__((target("avx2"))) inline __m256i Load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

__attribute__((target("avx2"))) inline int32_t Sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtsi128_si32(half);
}

__attribute__((target("avx2"))) void IntegerTileAvx2(const uint8_t* a, const int8_t* b, int64_t k,
                                                     int64_t exact, int32_t* c, int64_t stride) {
  constexpr int64_t kTile = kIntegerRows * kIntegerCols;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i wide[kTile];
  JFP4_UNROLL for (int64_t t = 0; t < kTile; ++t) wide[t] = _mm256_setzero_si256();
  for (int64_t start = 0; start < k; start += exact) {
    const int64_t end = std::min(k, start + exact);
    __m256i narrow[kTile];
    JFP4_UNROLL for (int64_t t = 0; t < kTile; ++t) narrow[t] = _mm256_setzero_si256();
    for (int64_t p = start; p < end; p += kIntegerLanes) {
      const __m256i b0 = Load(b + p), b1 = Load(b + k + p);
      JFP4_UNROLL for (int64_t i = 0; i < kIntegerRows; ++i) {
        const __m256i row = Load(a + i * k + p);
        narrow[2 * i] = _mm256_add_epi16(narrow[2 * i], _mm256_maddubs_epi16(row, b0));
        narrow[2 * i + 1] = _mm256_add_epi16(narrow[2 * i + 1], _mm256_maddubs_epi16(row, b1));
      }
    }
    JFP4_UNROLL for (int64_t t = 0; t < kTile; ++t) {
      wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(narrow[t], ones));
    }
  }
  JFP4_UNROLL for (int64_t i = 0; i < kIntegerRows; ++i) {
    c[i * stride] = Sum(wide[2 * i]);
    c[i * stride + 1] = Sum(wide[2 * i + 1]);
  }
}

__attribute__((target("avx2,fma"))) void FloatTileAvx2(const float* a, const float* b, int64_t k,
                                                       float* c, int64_t stride) {
  __m256 left[kFloatRows], right[kFloatRows];
  JFP4_UNROLL for (int64_t i = 0; i < kFloatRows; ++i) {
    left[i] = _mm256_loadu_ps(c + i * stride);
    right[i] = _mm256_loadu_ps(c + i * stride + 8);
  }
  for (int64_t p = 0; p < k; ++p, a += kFloatRows, b += kFloatCols) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
    // Products of codes are exact, so that a fused multiply-add rounds as an addition does.
    JFP4_UNROLL for (int64_t i = 0; i < kFloatRows; ++i) {
      const __m256 v = _mm256_broadcast_ss(a + i);
      left[i] = _mm256_fmadd_ps(v, b0, left[i]);
      right[i] = _mm256_fmadd_ps(v, b1, right[i]);
    }
  }
  JFP4_UNROLL for (int64_t i = 0; i < kFloatRows; ++i) {
    _mm256_storeu_ps(c + i * stride, left[i]);
    _mm256_storeu_ps(c + i * stride + 8, right[i]);
  }
}

#endif  // JFP4_X86

}  // namespace

IntegerTile ChooseIntegerTile() {
#ifdef JFP4_X86
  if (__builtin_cpu_supports("avx2")) return IntegerTileAvx2;
#endif
  return IntegerTilePortable;
}

FloatTile ChooseFloatTile() {
#ifdef JFP4_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FloatTileAvx2;
#endif
  return FloatTilePortable;
}

}  // namespace jfp4::host
