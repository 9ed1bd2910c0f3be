// RMSNorm of a sum, and its gradient: what each row is divided by is computed where it is used.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// Most columns of either: a row waits in the registers of one block.
constexpr int64_t kMaxNormColumns = 8192;

// For each of `batch` contiguous matrices [rows, cols]: sum = x + added, rounded, and y = sum *
// (scale / sqrt(mean(sum^2) + epsilon)), the mean a row's; in float32, rounded once at the end.
struct RmsNorm {
  const void* x;
  const void* added;  // null where nothing is: then x is the sum
  DType type;         // of all but scale
  int64_t batch, rows, cols;
  const float* scale;  // [batch, cols]
  float epsilon;
  void* sum;  // null where nothing is added
  void* y;
};

// The gradient of a loss by that sum, and by the scale: dx = ((h - x * mean(h * x) / q) / sqrt(q))
// + dsum, with q = mean(x^2) + epsilon and h = dy * scale; and the sum over rows of dy * x /
// sqrt(q), which is left in `parts` sums of as many rows each, in order.
struct RmsNormGradient {
  const void* x;  // what was normalised
  const void* dy;
  const void* dsum;  // null where the sum has no other use
  DType type;        // of all but scale and its gradient
  int64_t batch, rows, cols;
  int64_t parts, rows_of_part;  // the last parts may have fewer rows, or none
  const float* scale;           // [batch, cols]
  float epsilon;
  void* dx;
  float* dscale;  // [batch, parts, cols]
};

cudaError_t LaunchRmsNorm(const RmsNorm& args, cudaStream_t stream);
cudaError_t LaunchRmsNormGradient(const RmsNormGradient& args, cudaStream_t stream);

}  // namespace jfp4
