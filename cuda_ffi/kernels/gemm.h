// FP8 product of byte codes with scales, rank terms, bias and the estimator's slope in the
// epilogue.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/slope.h"
#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// y = ((a b^T) * a_scale * b_scale + u v + bias) * slope, rounded once to out_type. a is [batch, m,
// k], b is [batch, n, k], y [batch, m, n], all contiguous; a and b are 16-byte aligned and k is a
// positive multiple of 16. Not both of a and b are E5M2. Scales hold one number a row ([batch, m],
// [batch, n]), or one a matrix ([batch]) where
// *_scale_size is 1. u is [batch, m, rank], v [batch, rank, n], bias [batch, n]; rank 0 and a null
// bias leave those out, as a null w does the slope. Accumulation is the tensor cores' own, exact
// for E2M1 codes while partial sums stay below 4096; with `promote` every 128 products along k are
// added up in FP32 registers instead. `counter` is scratch.
struct Gemm {
  int64_t batch, m, n, k;
  const uint8_t* a;
  bool a_e5m2;
  const uint8_t* b;
  bool b_e5m2;
  const float* a_scale;
  int64_t a_scale_size;
  const float* b_scale;
  int64_t b_scale_size;
  const float* u;
  const float* v;
  int64_t rank;
  const float* bias;
  Slope slope;
  void* y;
  DType out_type;
  bool promote;
  TileCounter* counter;
};

cudaError_t LaunchGemm(const Gemm& args, cudaStream_t stream);

}  // namespace jfp4
