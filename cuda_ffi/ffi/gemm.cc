#include "cuda_ffi/ffi/gemm.h"

#include "cuda_ffi/ffi/launch.h"

namespace jfp4 {

// The copy engine moves 16 bytes at a time.
struct AlignedGemmCall : GemmCall {
  template <typename... Rest>
  static ffi::ErrorOr<Gemm> Read(Buffer a, Buffer a_scale, Buffer b, Rest... rest) {
    auto args = GemmCall::Read(a, a_scale, b, rest...);
    if (args.has_error()) return args;
    return CheckCopies(*args, a, b, args->k);
  }
};

}  // namespace jfp4

JFP4_CUDA_HANDLER(Jfp4GemmCuda, jfp4::AlignedGemmCall, jfp4::LaunchGemm);
