// Order statistics of a sample, for the outlier thresholds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// For each of `batch` contiguous tensors of `size` elements: of the elements 0, stride, 2 stride,
// ...
// (`count` of them), the ones at ranks low_rank and high_rank in ascending order, as float32,
// [batch] each; both NaN if an element looked at is NaN. Exact: a radix selection over the keys.
struct Thresholds {
  const void* x;
  DType type;
  int64_t batch, size;
  int64_t stride, count;
  int64_t low_rank, high_rank;
  float* lo;
  float* hi;
};

cudaError_t LaunchThresholds(const Thresholds& args, cudaStream_t stream);

}  // namespace jfp4
