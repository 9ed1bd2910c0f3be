// Element arithmetic of the quantising kernels: unpacking, clipping, scales, rounding to a format
// and the bytes of its codes. Bit for bit what jfp4/formats.py and jfp4/ops/quantize.py compute.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// --- formats ---

__host__ __device__ constexpr float FormatMax(Format format) {
  switch (format) {
    case Format::kE2M1:
      return 6.0f;
    case Format::kE1M2:
      return 3.5f;
    case Format::kE3M0:
      return 16.0f;
    case Format::kE2M1B3:
      return 1.5f;
    case Format::kE4M3:
      return 448.0f;
    default:
      return 57344.0f;
  }
}

// The smallest scale: 2^-126 over half the smallest code. Subnormal elements then have code zero,
// whether or not they are flushed.
__host__ __device__ constexpr float FormatMinScale(Format format) {
  switch (format) {
    case Format::kE2M1:
    case Format::kE1M2:
      return 0x1p-124f;
    case Format::kE3M0:
      return 0x1p-123f;
    case Format::kE2M1B3:
      return 0x1p-122f;
    case Format::kE4M3:
      return 0x1p-116f;
    default:
      return 0x1p-109f;
  }
}

__host__ __device__ constexpr bool IsFourBit(Format format) { return format < Format::kE4M3; }

constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr uint32_t kNaNBits = 0x7FC00000;
constexpr uint32_t kSignBit = 0x80000000;

// The scale of a slice. `amax` is the bits of its largest magnitude: as integers, non-negative
// floats sort as numbers do, with NaN above infinity. At 2^126 and above, and for NaN, the scale is
// NaN; below it, the reciprocal of a scale is a normal number.
__device__ __forceinline__ float ScaleOf(uint32_t amax, Format format) {
  constexpr uint32_t kTooLarge = 0x7E800000;  // 2^126
  if (amax >= kTooLarge) return __uint_as_float(kNaNBits);
  // The quotient is formed in double and rounded once, as the reference does it.
  const float inverse_max = static_cast<float>(1.0 / static_cast<double>(FormatMax(format)));
  return fmaxf(__fmul_rn(__uint_as_float(amax), inverse_max), FormatMinScale(format));
}

// --- words of elements ---

__host__ __device__ constexpr int ElementBytes(DType type) { return type == DType::kF32 ? 4 : 2; }

// A 32-bit word of a tensor: two 16-bit elements, or one float32.
template <DType kType>
struct Word {
  static constexpr int kElements = 4 / ElementBytes(kType);

  // The larger and the smaller of each element; NaN if either is.
  static __device__ __forceinline__ uint32_t Max(uint32_t a, uint32_t b) {
    uint32_t result;
    if constexpr (kType == DType::kBF16) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else if constexpr (kType == DType::kF16) {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.f32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }

  static __device__ __forceinline__ uint32_t Min(uint32_t a, uint32_t b) {
    uint32_t result;
    if constexpr (kType == DType::kBF16) {
      asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else if constexpr (kType == DType::kF16) {
      asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("min.NaN.f32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }

  // The largest magnitude of each element, its sign to be ignored; NaN if either is.
  static __device__ __forceinline__ uint32_t MaxMagnitude(uint32_t a, uint32_t b) {
    uint32_t result;
    if constexpr (kType == DType::kBF16) {
      asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else if constexpr (kType == DType::kF16) {
      asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }

  static __device__ __forceinline__ float Get(uint32_t word, int index) {
    if constexpr (kType == DType::kBF16) {
      return __uint_as_float(index == 0 ? word << 16 : word & 0xFFFF0000);
    } else if constexpr (kType == DType::kF16) {
      const uint16_t bits = static_cast<uint16_t>(index == 0 ? word : word >> 16);
      return __half2float(__ushort_as_half(bits));
    } else {
      return __uint_as_float(word);
    }
  }
};

// Element `index` of a tensor whose type is known only at run time.
__device__ __forceinline__ float LoadElement(const void* x, DType type, int64_t index) {
  switch (type) {
    case DType::kBF16:
      return Word<DType::kBF16>::Get(static_cast<const uint16_t*>(x)[index], 0);
    case DType::kF16:
      return Word<DType::kF16>::Get(static_cast<const uint16_t*>(x)[index], 0);
    default:
      return static_cast<const float*>(x)[index];
  }
}

// --- clipping ---

enum class Clip { kNone, kCompensate };

// Of elements, or, times the reciprocal of a scale, of elements times that.
struct Limits {
  float lo, hi;
};
struct ScaledLimits {
  float lo, hi;
};

__device__ __forceinline__ float MaxOrNaN(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float MinOrNaN(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ uint32_t MagnitudeBits(float v) {
  return __float_as_uint(v) & ~kSignBit;
}

// The bits of |clip(v)|; an infinity is kept, so that its slice gets the scale NaN.
__device__ __forceinline__ uint32_t ClippedMagnitude(float v, const Limits& limits) {
  if (MagnitudeBits(v) == kInfinityBits) return kInfinityBits;
  return MagnitudeBits(MinOrNaN(MaxOrNaN(v, limits.lo), limits.hi));
}

// The extremes of some words, place by place. Clipping is monotonic, so the largest clipped
// magnitude is that of an extreme, and costs one packed maximum and one packed minimum a word
// instead of a conversion and a clip an element. The extremes start from zero, which never wins:
// clipping takes it to the least magnitude between the limits. Where nothing is clipped, one
// maximum of magnitudes is enough.
template <DType kType, Clip kClip>
struct Extremes {
  uint32_t high = 0, low = 0;

  __device__ __forceinline__ void Include(uint32_t word) {
    if constexpr (kClip == Clip::kNone) {
      high = Word<kType>::MaxMagnitude(high, word);
    } else {
      high = Word<kType>::Max(high, word);
      low = Word<kType>::Min(low, word);
    }
  }

  // The bits of the largest clipped magnitude in place `index` of the words.
  __device__ __forceinline__ uint32_t Magnitude(int index, const Limits& limits) const {
    const float most = Word<kType>::Get(high, index);
    if constexpr (kClip == Clip::kNone) return MagnitudeBits(most);
    const float least = Word<kType>::Get(low, index);
    return max(ClippedMagnitude(most, limits), ClippedMagnitude(least, limits));
  }

  // The same over all places.
  __device__ __forceinline__ uint32_t Magnitude(const Limits& limits) const {
    uint32_t result = Magnitude(0, limits);
    if constexpr (Word<kType>::kElements == 2) result = max(result, Magnitude(1, limits));
    return result;
  }
};

// --- rounding ---

// Bytes of codes, the first lowest: E5M2 where that is the carrier, else E4M3; round to nearest
// even, saturating.
template <Format kCarrier>
__device__ __forceinline__ uint32_t ToBytes(float a, float b, float c, float d) {
  uint32_t bytes;
  if constexpr (kCarrier == Format::kE5M2) {
    asm("{\n\t.reg .b16 low, high;\n\t"
        "cvt.rn.satfinite.e5m2x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e5m2x2.f32 high, %4, %3;\n\t"
        "mov.b32 %0, {low, high};\n\t}"
        : "=r"(bytes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  } else {
    asm("{\n\t.reg .b16 low, high;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
        "mov.b32 %0, {low, high};\n\t}"
        : "=r"(bytes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  }
  return bytes;
}

// What the lowest two bytes stand for, as float16, which has all of their values.
template <Format kCarrier>
__device__ __forceinline__ uint32_t HalvesOf(uint32_t bytes) {
  uint32_t halves;
  if constexpr (kCarrier == Format::kE5M2) {
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
  } else {
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
  }
  return halves;
}

// What the lowest byte stands for.
template <Format kCarrier>
__device__ __forceinline__ float FromByte(uint32_t bytes) {
  return Word<DType::kF16>::Get(HalvesOf<kCarrier>(bytes), 0);
}

// The value on the grid nearest to v, ties to the even code; zeros come out positive. 4-bit formats
// need no saturation: v is an element times 1 / scale, and the scale is taken from the same
// elements, so that |v| <= max * (1 + 2^-22), far below where anything would round past max.
template <Format kFormat>
__device__ __forceinline__ float RoundToGrid(float v) {
  if constexpr (kFormat == Format::kE2M1 || kFormat == Format::kE2M1B3) {
    // The last place of 1.5 * 2^(22 + e) is the step of the binade 2^e that v is in (what is below
    // the least normal value has that one's): float32's own rounding of their sum is the one
    // wanted, and taking the anchor off again is exact. Made inside the fused operations, it costs
    // one instruction to find 2^e.
    constexpr float kAnchor = 0x1.8p22f, kLeast = kFormat == Format::kE2M1 ? 1.0f : 0.25f;
    const float step = __uint_as_float(__float_as_uint(fmaxf(fabsf(v), kLeast)) & kInfinityBits);
    return __fmaf_rn(step, -kAnchor, __fmaf_rn(step, kAnchor, v));
  } else if constexpr (kFormat == Format::kE1M2) {
    constexpr float kAnchor = 0x1.8p22f;  // one step everywhere, 0.5
    return __fsub_rn(__fadd_rn(v, kAnchor), kAnchor);
  } else if constexpr (kFormat == Format::kE3M0) {
    // Powers of two from 2^-2: the exponent field is the code but for a constant that is even, so
    // that rounding the mantissa away to nearest even is what is wanted. Below 2^-2 there is zero.
    const uint32_t bits = MagnitudeBits(v);
    const uint32_t power = (bits + 0x003FFFFF + (bits >> 23 & 1)) & kInfinityBits;
    const float magnitude = fabsf(v) > 0.125f ? fmaxf(__uint_as_float(power), 0.25f) : 0.0f;
    return __fadd_rn(copysignf(magnitude, v), 0.0f);
  } else {
    return __fadd_rn(FromByte<kFormat>(ToBytes<kFormat>(v, 0.0f, 0.0f, 0.0f)), 0.0f);
  }
}

// The same of a magnitude, without taking out an exponent, which is an operation of the kind that
// quantising kernels are short of. 2^22 times a number has the step of the number's binade as its
// last place, and so has what is left of it when the number is taken off. Where that falls into the
// binade below, whose places are finer, the number is next to the first of its binade, and is still
// rounded to that. (A sum would rise into the binade above, whose places are too coarse.) For the
// same reason the least is a little more than the least normal value.
template <Format kFormat>
__device__ __forceinline__ float RoundMagnitude(float v) {
  if constexpr (kFormat == Format::kE2M1 || kFormat == Format::kE2M1B3) {
    constexpr float kAnchor = 0x1p22f;
    constexpr float kLeast = (kFormat == Format::kE2M1 ? 1.0f : 0.25f) * (1 + 0x1p-20f);
    const float anchor = fmaxf(v, kLeast);
    return __fmaf_rn(anchor, kAnchor, -__fmaf_rn(anchor, kAnchor, -v));
  } else {
    return RoundToGrid<kFormat>(v);
  }
}

// x / scale, from the reciprocal; subnormals, as factors and as the product, are zeros. Of a
// product that rounding alone takes to 2^-126 it may be zero or that: at most a zero's sign depends
// on it.
__device__ __forceinline__ float Scaled(float x, float inverse_scale) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(x), "f"(inverse_scale));
  return product;
}

__device__ __forceinline__ ScaledLimits Scaled(const Limits& limits, float inverse_scale) {
  return {Scaled(limits.lo, inverse_scale), Scaled(limits.hi, inverse_scale)};
}

// Clip(x) / scale. Products keep order, so both forms have the same bits: the one is for limits
// that several elements share with their scale, the other for a scale an element, where it costs a
// product an element and the scaled limits would cost two.
__device__ __forceinline__ float ScaledClip(float x, float inverse_scale, const ScaledLimits& l) {
  return fminf(fmaxf(Scaled(x, inverse_scale), l.lo), l.hi);
}

__device__ __forceinline__ float ScaledClip(float x, float inverse_scale, const Limits& l) {
  return Scaled(fminf(fmaxf(x, l.lo), l.hi), inverse_scale);
}

// The code of x as a float32 that ToBytes takes to its byte; meaningless where the scale is NaN.
template <Format kFormat, Clip kClip, typename AnyLimits>
__device__ __forceinline__ float Code(float x, float inverse_scale, const AnyLimits& limits) {
  const float u = Scaled(x, inverse_scale);
  const float v = kClip == Clip::kNone ? u : ScaledClip(x, inverse_scale, limits);
  if constexpr (kClip == Clip::kCompensate) {
    // What was clamped off is flushed as it is added: a flushed difference is exact.
    float sum;
    asm("add.rn.ftz.f32 %0, %1, %2;"
        : "=f"(sum)
        : "f"(RoundToGrid<kFormat>(v)), "f"(__fsub_rn(u, v)));
    return sum;
  } else if constexpr (IsFourBit(kFormat)) {
    const uint32_t sign = __float_as_uint(v) & kSignBit;  // a negative zero keeps it
    return __uint_as_float(__float_as_uint(RoundToGrid<kFormat>(v)) | sign);
  } else {
    return v;
  }
}

// The format whose bytes carry the codes.
__host__ __device__ constexpr Format Carrier(Format format, Clip clip) {
  return format == Format::kE5M2 && clip != Clip::kCompensate ? Format::kE5M2 : Format::kE4M3;
}

// --- bytes and nibbles ---

// Four E2M1 codes, E4M3 bytes, to four nibbles in bytes 0 and 2, the first lowest. By bits of the
// byte, the nibble is 7 6 3 2: for 0.5, which alone has 5 set and 3 clear, the last is to be set,
// too.
__device__ __forceinline__ uint32_t NibblesApart(uint32_t bytes) {
  const uint32_t last = bytes >> 2 | (bytes >> 5 & ~(bytes >> 3));
  const uint32_t nibbles =
      (last & 0x01010101) | (bytes >> 2 & 0x02020202) | (bytes >> 4 & 0x0C0C0C0C);
  return nibbles | nibbles >> 4;
}

// The same in bytes 0 and 1, and of eight codes in all four.
__device__ __forceinline__ uint32_t ToNibbles(uint32_t bytes) {
  return __byte_perm(NibblesApart(bytes), 0, 0x4420);
}
__device__ __forceinline__ uint32_t ToNibbles(uint32_t first, uint32_t second) {
  return __byte_perm(NibblesApart(first), NibblesApart(second), 0x6420);
}

// Eight E2M1 codes over 64, bytes `s 0 0 e e m 0 0`, to nibbles `s e e m`.
__device__ __forceinline__ uint32_t SmallToNibbles(uint32_t first, uint32_t second) {
  const uint32_t even = __byte_perm(first, second, 0x6420);
  const uint32_t odd = __byte_perm(first, second, 0x7531);
  const uint32_t low = (even >> 4 & 0x08080808) | (even >> 2 & ~0x08080808);
  const uint32_t high = (odd & 0x80808080) | (odd << 2 & ~0x80808080);
  return (low & 0x0F0F0F0F) | (high & ~0x0F0F0F0F);
}

// Transposes 4 x 4 bytes: in, a word a row, or, if `swapped`, the rows of either pair swapped; out,
// a word a column.
__device__ __forceinline__ void TransposeBytes(const uint32_t (&row)[4], uint32_t (&column)[4],
                                               bool swapped = false) {
  const uint32_t low = swapped ? 0x1504 : 0x5140, high = swapped ? 0x3726 : 0x7362;
  const uint32_t low01 = __byte_perm(row[0], row[1], low);
  const uint32_t low23 = __byte_perm(row[2], row[3], low);
  const uint32_t high01 = __byte_perm(row[0], row[1], high);
  const uint32_t high23 = __byte_perm(row[2], row[3], high);
  column[0] = __byte_perm(low01, low23, 0x5410);
  column[1] = __byte_perm(low01, low23, 0x7632);
  column[2] = __byte_perm(high01, high23, 0x5410);
  column[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace jfp4
