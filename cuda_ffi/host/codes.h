// Rounding to the element formats, and the bytes and nibbles that carry codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda_ffi/host/element.h"
#include "cuda_ffi/kernels/types.h"

namespace jfp4::host {

struct FormatSpec {
  int mantissa_bits;
  int bias;
  float max;
  float grid_step;  // the smallest positive value
};

constexpr FormatSpec kFormats[] = {
    {1, 1, 6.0f, 0.5f},          // E2M1
    {2, 0, 3.5f, 0.5f},          // E1M2
    {0, 3, 16.0f, 0.25f},        // E3M0
    {1, 3, 1.5f, 0.125f},        // E2M1 over four
    {3, 7, 448.0f, 0x1p-9f},     // E4M3
    {2, 15, 57344.0f, 0x1p-16f}  // E5M2
};

constexpr const FormatSpec& Spec(Format format) { return kFormats[static_cast<int>(format)]; }

// The grid value nearest to a number, ties to the even code, saturating; the sign is kept.
template <Format kFormat>
JFP4_INLINE float RoundToFormat(float v) {
  constexpr FormatSpec f = Spec(kFormat);
  constexpr int kShift = 23 - f.mantissa_bits;
  const float magnitude = std::min(std::fabs(v), f.max);
  // Numbers sort as their bits do, and dropping bits to the even neighbour rounds the number so,
  // exponents included. Below the least normal value the step is constant: adding 2**23 steps
  // leaves nothing below it.
  const float normal = FromBits(ShiftRounded(BitsOf(magnitude), kShift) << kShift);
  const float subnormal = ((magnitude * (1 / f.grid_step) + 0x1p23f) - 0x1p23f) * f.grid_step;
  constexpr float kLeastNormal = f.grid_step * (1 << f.mantissa_bits);
  return std::copysign(magnitude < kLeastNormal ? subnormal : normal, v);
}

// The byte that carries a grid value of a format.
template <Format kFormat>
JFP4_INLINE uint8_t ByteOfValue(float value) {
  constexpr bool kE5M2 = kFormat == Format::kE5M2;
  constexpr FormatSpec f = Spec(kE5M2 ? Format::kE5M2 : Format::kE4M3);
  constexpr float kLeastNormal = f.grid_step * (1 << f.mantissa_bits);
  const float magnitude = std::fabs(value);
  const uint32_t normal =
      (BitsOf(magnitude) >> (23 - f.mantissa_bits)) - (uint32_t(127 - f.bias) << f.mantissa_bits);
  const uint32_t subnormal = BitsOf(magnitude * (1 / f.grid_step) + 0x1p23f) & 0xFF;
  const uint32_t byte = magnitude < kLeastNormal ? subnormal : normal;
  return static_cast<uint8_t>(byte | (BitsOf(value) >> 24 & 0x80));
}

// The value of an E4M3 or E5M2 byte.
inline float CodeValue(uint8_t byte, bool e5m2) {
  const FormatSpec& f = Spec(e5m2 ? Format::kE5M2 : Format::kE4M3);
  const uint32_t sign = uint32_t{byte} >> 7 << 31, magnitude = byte & 0x7F;
  const uint32_t mantissa = magnitude & ((1 << f.mantissa_bits) - 1);
  const uint32_t exponent = magnitude >> f.mantissa_bits;
  const bool is_nan = e5m2 ? magnitude > 0x7C : magnitude == 0x7F;
  if (is_nan) return std::nanf("");
  if (e5m2 && magnitude == 0x7C) return FromBits(sign | kInfinityBits);
  if (exponent == 0) return FromBits(BitsOf(mantissa * f.grid_step) | sign);
  return FromBits(sign | (exponent + 127 - f.bias) << 23 | mantissa << (23 - f.mantissa_bits));
}

// The E4M3 bytes of E2M1's magnitudes, 0 to 6, and back.
constexpr uint8_t kE2M1Bytes[] = {0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C};

inline uint8_t NibbleOf(uint8_t byte) {
  const uint8_t magnitude = byte & 0x7F;
  const uint8_t code = magnitude == 0 ? 0 : magnitude == 0x30 ? 1 : (magnitude - 0x30) / 4;
  return code | (byte >> 4 & 8);
}

inline uint8_t ByteOf(uint8_t nibble) { return kE2M1Bytes[nibble & 7] | (nibble & 8) << 4; }

}  // namespace jfp4::host
