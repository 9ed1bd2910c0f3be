// One step of AdamW on parameters and moments in a few bits, in place: see jfp4/adamw.py, and
// jfp4/optim.py and jfp4/master.py for what is kept in what.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// What moments are made of: E4M3 bytes and float16 have a scale a block, float32 has none.
enum class Moment : int32_t { kE4M3, kF16, kF32 };

struct AdamW {
  // Elements of a row that share a scale, or the whole row where this does not divide it.
  static constexpr int64_t kBlock = 128;

  // What differs from step to step, float32 numbers in memory.
  struct Rates {
    float gradient;           // what it is multiplied by
    float learning_rate;      //
    float first_correction;   // 1 / (1 - b1^t)
    float second_correction;  // 1 / sqrt(1 - b2^t)
    float finite;             // 0 where the step is to be skipped
  };

  // Of the bits that a slice's parameters and moments are rounded by: keys, to which a row's number
  // is added, and the number of the first column. Of a part of a tensor they tell where it lies.
  struct Keys {
    uint32_t param, moments, column;
  };

  int64_t slices, rows, n;  // arrays are [slices, rows, n]
  const void* grad;
  DType grad_type;
  void* param;  // float16: times 2^10
  DType param_type;
  void* first;
  Moment first_type;
  uint8_t* first_exponents;  // [slices, rows, n / block], biased as float32's are
  void* second;
  Moment second_type;
  uint8_t* second_exponents;
  const Rates* rates;
  const Keys* keys;  // a slice each
  float b1, rest1;   // rest: 1 - b, rounded once
  float b2, rest2;
  float eps;
  float weight_decay;
  // |first| is clipped to bound * root + slack, where the second moment's root is kept. Slack is 0,
  // or infinity beside a bound of 0: nothing is clipped, and no infinite bound meets a root of 0.
  float bound, slack;
  bool root;        // whether the second moment's root is kept, rather than itself
  bool stochastic;  // how moments are rounded; parameters in two bytes always are stochastically

  int64_t block() const { return n % kBlock == 0 ? kBlock : n; }
};

// Does nothing where the rates say that the step is to be skipped.
cudaError_t LaunchAdamW(const AdamW& args, cudaStream_t stream);

// --- the arithmetic of an element, the same on every platform: float32, each operation rounded ---

#ifdef __CUDACC__
#define JFP4_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JFP4_HOST_DEVICE inline
#endif

namespace adamw {

constexpr uint32_t kInfinity = 0x7F800000;
constexpr int kMantissaBits = 23;

JFP4_HOST_DEVICE uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

JFP4_HOST_DEVICE float Value(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Never fused: nvcc fuses a product and a sum unless told not to, operation by operation.
JFP4_HOST_DEVICE float Mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// a * b + c, rounded once.
JFP4_HOST_DEVICE float Fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// Values, whatever they are kept in.
struct Element {
  float param, first, second;
};

// x, or the nearest to it within [-most, most]; NaN if either is one, as jnp.clip has it.
JFP4_HOST_DEVICE float Clip(float x, float most) {
#ifdef __CUDA_ARCH__
  float clipped;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(clipped) : "f"(x), "f"(most));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(clipped) : "f"(-most));
  return clipped;
#else
  if (x > most) x = most;
  if (x < -most) x = -most;
  return most != most ? most : x;
#endif
}

// The moments after a step: of the second one itself, where its root is kept as well.
JFP4_HOST_DEVICE void AdvanceMoments(const AdamW& c, const AdamW::Rates& rates, float grad,
                                     float& first, float& second) {
  const float g = Mul(grad, rates.gradient);
  if (c.root) {
    first = Clip(first, Fma(c.bound, second, c.slack));
    second = Mul(second, second);
  }
  first = Fma(c.rest1, g, Mul(c.b1, first));
  second = Fma(c.rest2, Mul(g, g), Mul(c.b2, second));
}

JFP4_HOST_DEVICE float Denominator(const AdamW& c, const AdamW::Rates& rates, float root) {
  return Fma(root, rates.second_correction, c.eps);
}

// The reciprocal is the denominator's: a quotient would take twice as many instructions.
JFP4_HOST_DEVICE float AdvanceParam(const AdamW& c, const AdamW::Rates& rates, float param,
                                    float first, float reciprocal) {
  const float direction = Mul(Mul(first, rates.first_correction), reciprocal);
  return Fma(-rates.learning_rate, Fma(c.weight_decay, param, direction), param);
}

// The element after a step. A NaN stays one.
JFP4_HOST_DEVICE Element Advance(const AdamW& c, const AdamW::Rates& rates, float grad,
                                 Element old) {
  float first = old.first, second = old.second;
  AdvanceMoments(c, rates, grad, first, second);
  const float root = sqrtf(second), reciprocal = 1.0f / Denominator(c, rates, root);
  return {AdvanceParam(c, rates, old.param, first, reciprocal), first, c.root ? root : second};
}

// --- rounding, as jfp4/ops/rounding.py has it ---

JFP4_HOST_DEVICE uint32_t Mix(uint32_t x) {
  x += 0x9E3779B9;
  x = (x ^ (x >> 17)) * 0xED5AD4BB;
  x = (x ^ (x >> 11)) * 0xAC4C1B51;
  x = (x ^ (x >> 15)) * 0x31848BAB;
  return x ^ (x >> 14);
}

// The bits that a parameter is rounded by, of a row's bits: of bfloat16, which needs 16, two
// neighbours share a hash, the first its upper half.
JFP4_HOST_DEVICE uint32_t ParamBits(DType type, uint32_t row, uint32_t column) {
  if (type != DType::kBF16) return Mix(row ^ column);
  return Mix(row ^ column >> 1) << column % 2 * 16;
}

// Those that both moments are rounded by, of a row's bits: the first by the hash, of whose upper
// bits E4M3 needs 20, the second's root by its halves exchanged, of which float16 needs 13.
struct MomentBits {
  uint32_t first, second;
};

JFP4_HOST_DEVICE MomentBits BitsOfMoments(uint32_t row, uint32_t column) {
  const uint32_t hash = Mix(row ^ column);
  return {hash, hash << 16 | hash >> 16};
}

// What a float32 is rounded to: its mantissa's explicit bits, and the power of two under which
// steps no longer shrink. (Bfloat16's shrink as long as float32's do.)
struct Grid {
  int mantissa_bits;
  float least;
};

constexpr Grid kBF16Grid = {7, 0}, kF16Grid = {10, 0x1p-14f}, kE4M3Grid = {3, 0x1p-6f};

constexpr uint32_t kSign = 0x80000000;

// Whether x is finite, and its step one of its own binade.
JFP4_HOST_DEVICE bool IsNormal(float x, Grid grid) {
  const uint32_t least = Bits(grid.least);
  return (Bits(x) & ~kSign) - least < kInfinity - least;
}

// Of a normal x: what the grid has no bits for is carried into its last one, if it exceeds as many
// bits. What then is below the grid is to be cut off.
JFP4_HOST_DEVICE float CarryNormal(float x, Grid grid, uint32_t bits) {
  // The sign is above all that is carried.
  return Value(Bits(x) + (~bits >> (32 - (kMantissaBits - grid.mantissa_bits))));
}

JFP4_HOST_DEVICE float RoundNormal(float x, Grid grid, uint32_t bits) {
  const uint32_t below = (1u << (kMantissaBits - grid.mantissa_bits)) - 1;
  return Value(Bits(CarryNormal(x, grid, bits)) & ~below);
}

// x on the grid, up by as many chances in 2^24 as it is above the lower neighbour; the upper 24
// bits count.
JFP4_HOST_DEVICE float RoundStochastically(float x, Grid grid, uint32_t bits) {
  if (IsNormal(x, grid)) return RoundNormal(x, grid, bits);
  const uint32_t magnitude = Bits(x) & ~kSign;
  if (magnitude >= kInfinity) return x;
  const uint32_t step =
      Bits(grid.least) - (static_cast<uint32_t>(grid.mantissa_bits) << kMantissaBits);
  const uint32_t inverse = (254u << kMantissaBits) - step;
  const float steps = Mul(Value(magnitude), Value(inverse));
  const float below = floorf(steps);
  const float threshold = Mul(static_cast<float>(static_cast<int32_t>(bits >> 8)), 0x1p-24f);
  const float rounded = threshold < steps - below ? below + 1.0f : below;
  return copysignf(Mul(rounded, Value(step)), x);
}

// --- scales of blocks, as jfp4/optim.py has them ---

// The scale, as a biased exponent, of a block whose largest magnitude has the bits `amax`; 255 for
// what is not finite.
JFP4_HOST_DEVICE uint32_t ScaleExponent(uint32_t amax, Moment type) {
  constexpr uint32_t kLeast = 127 - 80;
  const uint32_t top = type == Moment::kE4M3 ? 7 : 14;  // the format's last binade but one
  const uint32_t binade = amax >> kMantissaBits;
  if (binade == 255) return 255;
  return (binade > kLeast ? binade : kLeast) - top;
}

JFP4_HOST_DEVICE float ScaleOfExponent(uint32_t exponent) {
  return Value(exponent << kMantissaBits);
}

// 1 / scale; zero for an infinite one.
JFP4_HOST_DEVICE float InverseScale(uint32_t exponent) {
  return exponent == 255 ? 0.0f : Value((254 - exponent) << kMantissaBits);
}

}  // namespace adamw

#undef JFP4_HOST_DEVICE

}  // namespace jfp4
