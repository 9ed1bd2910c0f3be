#include "cuda_ffi/ffi/packed_gemm.h"

#include "cuda_ffi/ffi/launch.h"

namespace jfp4 {

// Rows are read 16 bytes at a time.
struct AlignedPackedGemmCall : PackedGemmCall {
  template <typename... Rest>
  static ffi::ErrorOr<PackedGemm> Read(Buffer a, Buffer a_scale, Buffer b, Rest... rest) {
    auto args = PackedGemmCall::Read(a, a_scale, b, rest...);
    if (args.has_error()) return args;
    return CheckCopies(*args, a, b, args->k / 2);
  }
};

}  // namespace jfp4

JFP4_CUDA_HANDLER(Jfp4PackedGemmCuda, jfp4::AlignedPackedGemmCall, jfp4::LaunchPackedGemm);
