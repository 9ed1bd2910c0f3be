// The product that byte codes and packed codes share on the CPU.
#pragma once

#include <cstdint>

#include "cuda_ffi/kernels/gemm.h"
#include "xla/ffi/api/ffi.h"

namespace jfp4::host {

// How the codes of an operand are written: a byte each, or as E2M1 nibbles, the earlier in the low
// one.
enum class Encoding { kE4M3, kE5M2, kNibbles };

// y of `args`, whose operands are written as `a` and `b` say. Sums of 4-bit codes are exact and
// then rounded once; others are float32's.
void Multiply(const Gemm& args, Encoding a, Encoding b, xla::ffi::ThreadPool pool);

}  // namespace jfp4::host
