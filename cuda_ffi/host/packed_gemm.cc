// The product of packed codes on the CPU.
#include "cuda_ffi/ffi/packed_gemm.h"

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/product.h"

namespace jfp4::host {
namespace {

std::vector<float> Decode(const uint8_t* packed, int64_t bytes) {
  std::vector<float> values(2 * bytes);
  for (int64_t i = 0; i < bytes; ++i) {
    values[2 * i] = CodeValue(ByteOf(packed[i] & 15), false);
    values[2 * i + 1] = CodeValue(ByteOf(packed[i] >> 4), false);
  }
  return values;
}

void RunPackedGemm(const PackedGemm& args, ffi::ThreadPool pool) {
  const Decoded codes{Decode(args.a, args.batch * args.m * args.k / 2),
                      Decode(args.b, args.batch * args.n * args.k / 2)};
  Gemm bytes{};
  bytes.batch = args.batch;
  bytes.m = args.m;
  bytes.n = args.n;
  bytes.k = args.k;
  bytes.a_scale = args.a_scale;
  bytes.a_scale_size = args.a_scale_size;
  bytes.b_scale = args.b_scale;
  bytes.b_scale_size = args.b_scale_size;
  bytes.bias = args.bias;
  bytes.y = args.y;
  bytes.out_type = args.out_type;
  Multiply(bytes, codes, pool);
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4PackedGemmCpu, jfp4::PackedGemmCall, jfp4::host::RunPackedGemm);
