// Quantisation: scale, round, and both layouts of the codes from one read of the input.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// Inputs are `batch` contiguous row-major matrices [rows, cols]. Any output pointer may be null:
// that output is not written. `codes` is [batch, rows, cols], `codes_t` its transpose [batch, cols,
// rows]. An `amax_floor` is what the largest magnitude of each row or column is at least, of the
// scale's shape, its sign bit clear: of a part of a matrix, the whole's. Null is zeros.
struct QuantizeInput {
  const void* x;
  DType type;
  int64_t batch, rows, cols;
};

// Outlier clamp and compensation: one pair of thresholds a matrix, [batch]; null clamps nothing.
// With `compensate`, what was clamped off is added to the code in units of the scale and the sum is
// rounded to E4M3, saturating.
struct Outliers {
  const float* lo = nullptr;
  const float* hi = nullptr;
  bool compensate = false;
};

// One scale a row. `packed`, [batch, rows, ceil(cols / 2)], holds E2M1 nibbles, the earlier in the
// low one; it needs Format::kE2M1 without compensation. Scale is [batch, rows].
struct QuantizeRows {
  QuantizeInput in;
  Outliers outliers;
  Format format;
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed;
  float* scale;
  const float* amax_floor;
};
cudaError_t LaunchQuantizeRows(const QuantizeRows& args, cudaStream_t stream);

// One scale a column, [batch, cols]. `packed_t`, [batch, cols, ceil(rows / 2)], is packed along the
// rows, which is how a weight [k, n] is stored for its product. `amax` is scratch, [batch, cols].
struct QuantizeColumns {
  QuantizeInput in;
  Outliers outliers;
  Format format;
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed_t;
  float* scale;
  float* amax;
  const float* amax_floor;
};
cudaError_t LaunchQuantizeColumns(const QuantizeColumns& args, cudaStream_t stream);

// A gradient dy for both of its products: dy * col_factor with a scale a row, and dy * row_factor
// with a scale a column, the latter transposed. row_factor and row_scale are [batch, rows],
// col_factor and col_scale [batch, cols]; `amax` is scratch, batch * (rows + cols) numbers.
struct QuantizeGradient {
  QuantizeInput in;
  Format format;
  const float* col_factor;
  const float* row_factor;
  uint8_t* codes;
  float* row_scale;
  uint8_t* codes_t;
  float* col_scale;
  float* amax;
  const float* row_floor;
  const float* col_floor;
};
cudaError_t LaunchQuantizeGradient(const QuantizeGradient& args, cudaStream_t stream);

}  // namespace jfp4
