// The slope of the differentiable gradient estimator (arXiv 2501.17116, equation 8) for E2M1, as
// jfp4/ops/dge.py computes it but for the power.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

#ifdef __CUDACC__
#define JFP4_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JFP4_HOST_DEVICE inline
#endif

// What a product is multiplied by: the slope at w / scale. Null w leaves it out.
struct Slope {
  const void* w;  // [batch, m, n]
  DType type;
  const float* scale;  // a number a column ([batch, n]), or one a matrix ([batch]) for size 1
  int64_t scale_size;
  float k;  // above 1
  float cap;
};

// The slope at v; NaN for NaN. The GPU's logarithm and exponential are its approximate ones: where
// the cap does not hold, the result is within 2^-20 of its own size.
JFP4_HOST_DEVICE float SlopeAt(float v, float k, float cap) {
  constexpr float kMax = 6;  // past it the end of the last interval counts
  const float inverse = 1 / k;
#ifdef __CUDA_ARCH__
  // Every instruction counts: a product's epilogue computes this for each of its elements. What is
  // subnormal may be flushed, since the cap holds there.
  float magnitude, distance, power, slope;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(magnitude) : "f"(std::fabs(v)), "f"(kMax));
  // The power of two of the interval, its exponent that of 1 at least, against 2's.
  const uint32_t exponent = max(__float_as_uint(magnitude), 0x3F800000u) & 0x7F800000u;
  const float steps = magnitude * __uint_as_float(0x7F800000u - exponent);
  distance = std::fabs(2 * (steps - std::floor(steps)) - 1);
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(distance));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(power * (inverse - 1)));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(slope) : "f"(power * inverse), "f"(cap));
  return slope;
#else
  float magnitude = std::fabs(v);
  if (magnitude > kMax) magnitude = kMax;
  // In units of the grid's step, a power of two, where v lies: all exact.
  const float steps = magnitude * (magnitude < 2 ? 2.0f : magnitude < 4 ? 1.0f : 0.5f);
  const float distance = std::fabs(2 * (steps - std::floor(steps)) - 1);
  const float slope = std::exp2(std::log2(distance) * (inverse - 1)) * inverse;
  return slope > cap ? cap : slope;
#endif
}

#undef JFP4_HOST_DEVICE

}  // namespace jfp4
