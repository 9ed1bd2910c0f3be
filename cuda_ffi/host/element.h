// Numbers in memory to float32 and back, a bit pattern at a time: the threads that XLA runs these
// on may flush subnormals, so nothing here computes with one.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_ffi/kernels/types.h"

// Small enough, and called often enough, to belong to their callers, whatever these are built for.
#define JFP4_INLINE [[gnu::always_inline]] inline

namespace jfp4::host {

JFP4_INLINE uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

JFP4_INLINE float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr uint32_t kSignBit = 0x80000000;
constexpr uint32_t kInfinityBits = 0x7F800000;

JFP4_INLINE float FromBF16(uint16_t v) { return FromBits(uint32_t{v} << 16); }

JFP4_INLINE float FromF16(uint16_t v) {
  constexpr float kSubnormalStep = 0x1p-24f;
  const uint32_t sign = uint32_t{v} >> 15 << 31, exponent = v >> 10 & 31, mantissa = v & 1023;
  const uint32_t subnormal =
      BitsOf(static_cast<float>(static_cast<int32_t>(mantissa)) * kSubnormalStep);
  const uint32_t rebias = exponent == 31 ? 255 - 31 : 127 - 15;
  const uint32_t normal = (exponent + rebias) << 23 | mantissa << 13;
  return FromBits(sign | (exponent == 0 ? subnormal : normal));
}

// `bits` without its last `shift`, rounded to nearest, ties to even.
JFP4_INLINE uint32_t ShiftRounded(uint32_t bits, int shift) {
  return (bits + (1u << (shift - 1)) - 1 + (bits >> shift & 1)) >> shift;
}

inline uint16_t ToBF16(float v) {
  const uint32_t bits = BitsOf(v);
  if ((bits & ~kSignBit) > kInfinityBits) return bits >> 16 | 0x40;  // a NaN stays one
  return ShiftRounded(bits, 16);
}

inline uint16_t ToF16(float v) {
  constexpr float kLeastNormal = 0x1p-14f, kSubnormalSteps = 0x1p24f;
  constexpr uint32_t kRebias = 127 - 15, kInfinity = 31 << 10;
  const uint32_t bits = BitsOf(v) & ~kSignBit, sign = BitsOf(v) >> 16 & 0x8000;
  if (bits > kInfinityBits) return sign | kInfinity | 0x200;
  const float magnitude = FromBits(bits);
  if (magnitude < kLeastNormal) {
    // Adding 2**23 leaves no bits below one, and float32's own rounding does the work.
    return sign | (BitsOf(magnitude * kSubnormalSteps + 0x1p23f) & 0x7FF);
  }
  const uint32_t rounded = ShiftRounded(bits, 13) - (kRebias << 10);
  return sign | (rounded < kInfinity ? rounded : kInfinity);
}

// `count` consecutive numbers from the `offset`-th.
JFP4_INLINE void Load(const void* from, DType type, int64_t offset, int64_t count, float* to) {
  switch (type) {
    case DType::kF32:
      std::memcpy(to, static_cast<const float*>(from) + offset, count * sizeof(float));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        to[i] = FromBF16(static_cast<const uint16_t*>(from)[offset + i]);
      }
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        to[i] = FromF16(static_cast<const uint16_t*>(from)[offset + i]);
      }
  }
}

inline void Store(const float* from, int64_t count, DType type, void* to, int64_t offset) {
  switch (type) {
    case DType::kF32:
      std::memcpy(static_cast<float*>(to) + offset, from, count * sizeof(float));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<uint16_t*>(to)[offset + i] = ToBF16(from[i]);
      }
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<uint16_t*>(to)[offset + i] = ToF16(from[i]);
      }
  }
}

}  // namespace jfp4::host
