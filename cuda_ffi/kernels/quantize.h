// Quantisation: scale, round, and both layouts of the codes from one read of the input.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// Inputs are `batch` contiguous row-major matrices [rows, cols]. `codes` is [batch, rows, cols],
// `codes_t` its transpose [batch, cols, rows]; of rows and of columns, codes of any kind may be
// null and are not written then. An `amax_floor` is what the largest magnitude of each row or
// column is at least, of the scale's shape, its sign bit clear: of a part of a matrix, the whole's.
// Null is zeros.
struct QuantizeInput {
  const void* x;
  DType type;
  int64_t batch, rows, cols;
};

// Outlier clamp and compensation: one pair of thresholds a matrix, [batch]. What was clamped off is
// added to the code in units of the scale and the sum is rounded to E4M3, saturating, so the format
// is one of four bits. Null clamps nothing.
struct Outliers {
  const float* lo = nullptr;
  const float* hi = nullptr;
};

// One scale a row. `packed`, [batch, rows, ceil(cols / 2)], holds E2M1 nibbles, the earlier in the
// low one; it needs Format::kE2M1 without outliers. Scale is [batch, rows].
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
// rows, which is how a weight [k, n] is stored for its product. `amax` is scratch, [batch, cols]:
// for magnitudes, or for a TileCounter.
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

// The largest magnitudes of a gradient dy for both of its products: of the rows of dy * col_factor
// and of the columns of dy * row_factor. Their bits compare as integers: a NaN is above all. What
// is of rows is [batch, rows], and of columns [batch, cols]. `counters`, [batch], is scratch.
struct GradientAmax {
  QuantizeInput in;
  const float* col_factor;
  const float* row_factor;
  float* row_amax;
  float* col_amax;
  TileCounter* counters;
};
cudaError_t LaunchGradientAmax(const GradientAmax& args, cudaStream_t stream);

// The gradient's codes, of a scale a row, and transposed of one a column, which these magnitudes
// give: of a part of a gradient, the whole's. They must not be less than its own: 4-bit codes do
// not saturate.
struct QuantizeGradient {
  QuantizeInput in;
  Format format;
  const float* col_factor;
  const float* row_factor;
  const float* row_amax;
  const float* col_amax;
  uint8_t* codes;
  float* row_scale;
  uint8_t* codes_t;
  float* col_scale;
};
cudaError_t LaunchQuantizeGradient(const QuantizeGradient& args, cudaStream_t stream);

}  // namespace jfp4
