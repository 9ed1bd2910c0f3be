// Element types and formats, as the launch functions take them.
#pragma once

#include <cstdint>

namespace jfp4 {

// What tensors are made of outside the kernels.
enum class DType : int32_t { kBF16, kF16, kF32 };

// Element formats of codes; the order is that of jfp4.formats.FORMATS. All but the last two are
// 4-bit formats, whose codes are carried as E4M3 bytes; E5M2 codes are E5M2 bytes. E2M1B3 is E2M1
// over four: why is said there, at operand_format.
enum class Format : int32_t { kE2M1, kE1M2, kE3M0, kE2M1B3, kE4M3, kE5M2 };

// Scratch memory of some kernels, of whatever content, 8-byte aligned.
struct TileCounter;
constexpr int kCounterWords = 4;  // of 32 bits

}  // namespace jfp4
