// The product of packed codes on the CPU.
#include "cuda_ffi/ffi/packed_gemm.h"

#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/product.h"

namespace jfp4::host {
namespace {

void RunPackedGemm(const PackedGemm& args, ffi::ThreadPool pool) {
  Gemm gemm{};
  gemm.batch = args.batch;
  gemm.m = args.m;
  gemm.n = args.n;
  gemm.k = args.k;
  gemm.a = args.a;
  gemm.b = args.b;
  gemm.a_scale = args.a_scale;
  gemm.a_scale_size = args.a_scale_size;
  gemm.b_scale = args.b_scale;
  gemm.b_scale_size = args.b_scale_size;
  gemm.bias = args.bias;
  gemm.y = args.y;
  gemm.out_type = args.out_type;
  Multiply(gemm, Encoding::kNibbles, Encoding::kNibbles, pool);
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4PackedGemmCpu, jfp4::PackedGemmCall, jfp4::host::RunPackedGemm);
