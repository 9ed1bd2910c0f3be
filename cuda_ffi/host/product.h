// The product that byte codes and packed codes share on the CPU, once they are decoded.
#pragma once

#include <vector>

#include "cuda_ffi/kernels/gemm.h"
#include "xla/ffi/api/ffi.h"

namespace jfp4::host {

// Values of the codes, which are exact in float32, in place of the bytes of `args`.
struct Decoded {
  std::vector<float> a, b;
};

// y of `args`, whose own a and b are not looked at. Sums are those of double precision: exact for
// 4-bit codes, and for others rounded far below float32.
void Multiply(const Gemm& args, const Decoded& codes, xla::ffi::ThreadPool pool);

}  // namespace jfp4::host
