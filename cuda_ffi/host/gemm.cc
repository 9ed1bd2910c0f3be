// The product of byte codes on the CPU.
#include "cuda_ffi/ffi/gemm.h"

#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/product.h"

namespace jfp4::host {
namespace {

void RunGemm(const Gemm& args, ffi::ThreadPool pool) {
  const auto encoding = [](bool e5m2) { return e5m2 ? Encoding::kE5M2 : Encoding::kE4M3; };
  Multiply(args, encoding(args.a_e5m2), encoding(args.b_e5m2), pool);
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4GemmCpu, jfp4::GemmCall, jfp4::host::RunGemm);
