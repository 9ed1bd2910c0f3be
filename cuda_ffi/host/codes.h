// Rounding to the element formats, and the bytes and nibbles that carry codes.
#pragma once

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
  bool four_bits;
};

constexpr FormatSpec kFormats[] = {
    {1, 1, 6.0f, 0.5f, true},           // E2M1
    {2, 0, 3.5f, 0.5f, true},           // E1M2
    {0, 3, 16.0f, 0.25f, true},         // E3M0
    {3, 7, 448.0f, 0x1p-9f, false},     // E4M3
    {2, 15, 57344.0f, 0x1p-16f, false}  // E5M2
};

constexpr const FormatSpec& Spec(Format format) { return kFormats[static_cast<int>(format)]; }

// The index of the grid value nearest to a number's magnitude, ties to even, saturating: exponent
// and mantissa bits of the code.
template <Format kFormat>
inline uint32_t MagnitudeCode(float v) {
  constexpr FormatSpec f = Spec(kFormat);
  constexpr int kShift = 23 - f.mantissa_bits;
  constexpr uint32_t kMaxBits = [] {
    // Of a constant: the bits of f.max, its exponent counted up.
    uint32_t exponent = 127;
    float m = f.max;
    while (m >= 2) m /= 2, ++exponent;
    return exponent << 23 | static_cast<uint32_t>((m - 1) * 0x1p23f);
  }();
  constexpr uint32_t kLeastNormalBits = static_cast<uint32_t>(128 - f.bias) << 23;
  constexpr float kSteps = 1 / f.grid_step;
  uint32_t bits = BitsOf(v) & ~kSignBit;
  bits = bits < kMaxBits ? bits : kMaxBits;
  const uint32_t normal = ShiftRounded(bits, kShift) - (uint32_t(127 - f.bias) << f.mantissa_bits);
  // Below the least normal value the step is constant; adding 2**23 steps leaves nothing below it.
  const uint32_t subnormal = BitsOf(FromBits(bits) * kSteps + 0x1p23f) & 0xFF;
  return bits < kLeastNormalBits ? subnormal : normal;
}

// The E4M3 bytes of a 4-bit format's magnitudes.
constexpr uint8_t kCarriers[3][8] = {
    {0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C},  // 0 .5 1 1.5 2 3 4 6
    {0x00, 0x30, 0x38, 0x3C, 0x40, 0x42, 0x44, 0x46},  // 0 .5 1 1.5 2 2.5 3 3.5
    {0x00, 0x28, 0x30, 0x38, 0x40, 0x48, 0x50, 0x58},  // 0 .25 .5 1 2 4 8 16
};

// The byte that carries round(v); `v` is a number.
template <Format kFormat>
inline uint8_t CodeByte(float v) {
  uint32_t code = MagnitudeCode<kFormat>(v);
  if constexpr (Spec(kFormat).four_bits) code = kCarriers[static_cast<int>(kFormat)][code];
  return code | (BitsOf(v) >> 24 & 0x80);
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

// The nibble of an E2M1 code that is carried in E4M3: one of the bytes in kCarriers[0].
inline uint8_t NibbleOf(uint8_t byte) {
  const uint8_t magnitude = byte & 0x7F;
  // 0, 30, 38, 3C, 40, 44, 48, 4C: from 38 on a step is four.
  const uint8_t code = magnitude == 0 ? 0 : magnitude == 0x30 ? 1 : (magnitude - 0x30) / 4;
  return code | (byte >> 4 & 8);
}

inline uint8_t ByteOf(uint8_t nibble) { return kCarriers[0][nibble & 7] | (nibble & 8) << 4; }

}  // namespace jfp4::host
