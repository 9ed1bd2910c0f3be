// The product of byte codes on the CPU.
#include "cuda_ffi/ffi/gemm.h"

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/product.h"

namespace jfp4::host {
namespace {

std::vector<float> Decode(const uint8_t* bytes, int64_t count, bool e5m2) {
  float table[256];
  for (int i = 0; i < 256; ++i) table[i] = CodeValue(i, e5m2);
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = table[bytes[i]];
  return values;
}

void RunGemm(const Gemm& args, ffi::ThreadPool pool) {
  const Decoded codes{Decode(args.a, args.batch * args.m * args.k, args.a_e5m2),
                      Decode(args.b, args.batch * args.n * args.k, args.b_e5m2)};
  Multiply(args, codes, pool);
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4GemmCpu, jfp4::GemmCall, jfp4::host::RunGemm);
