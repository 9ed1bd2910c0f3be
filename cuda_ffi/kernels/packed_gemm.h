// Product of packed E2M1 operands, for few rows: bound by the bytes of b, so those are four bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// y = (a b^T) * a_scale * b_scale + bias, rounded once to out_type. a is [batch, m, k / 2] and b
// [batch, n, k / 2] bytes of two E2M1 nibbles, the earlier along k in the low one; 16-byte aligned,
// k a multiple of 32. Scales and bias as in gemm.h.
struct PackedGemm {
  int64_t batch, m, n, k;
  const uint8_t* a;
  const uint8_t* b;
  const float* a_scale;
  int64_t a_scale_size;
  const float* b_scale;
  int64_t b_scale_size;
  const float* bias;
  void* y;
  DType out_type;
};

cudaError_t LaunchPackedGemm(const PackedGemm& args, cudaStream_t stream);

}  // namespace jfp4
