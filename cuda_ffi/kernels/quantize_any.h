// Quantisation of any shape, alignment, type and format, chosen at run time: what the other kernels
// do not serve.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_ffi/kernels/quantize.h"

namespace jfp4 {

// Scales along one axis: the row's if row_scale is set, else the column's, from col_amax, which is
// scratch. Known magnitudes, of the rows or the columns, are not looked for.
struct Any {
  QuantizeInput in;
  Outliers outliers;
  Format format;
  const float* row_factor;
  const float* col_factor;
  float* row_scale;
  float* col_scale;
  float* col_amax;
  const float* amax_floor;
  const float* known_amax;
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed;
  uint8_t* packed_t;
};

cudaError_t LaunchAny(const Any& args, cudaStream_t stream);

}  // namespace jfp4
