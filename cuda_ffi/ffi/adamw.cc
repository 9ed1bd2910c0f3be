#include "cuda_ffi/ffi/adamw.h"

#include <string>
#include <utility>

#include "cuda_ffi/ffi/launch.h"

namespace jfp4 {

// Where rows are whole blocks, a thread takes its elements 16 bytes at a time.
struct AlignedAdamWCall : AdamWCall {
  template <typename... Operands>
  static ffi::ErrorOr<AdamWParts> Read(Operands... operands) {
    auto parts = AdamWCall::Read(operands...);
    if (parts.has_error() || parts->front().block() != AdamW::kBlock) return parts;
    for (const AdamW& args : *parts) {
      const std::pair<const char*, const void*> wide[] = {{"grad", args.grad},
                                                          {"param", args.param},
                                                          {"first", args.first},
                                                          {"second", args.second}};
      for (const auto& [name, at] : wide) {
        const uintptr_t excess = reinterpret_cast<uintptr_t>(at) % 16;
        if (excess != 0) {
          return Refusal<AdamWParts>(ffi::Error::InvalidArgument(
              std::string(name) + " starts " + std::to_string(excess) +
              " bytes past a multiple of 16; expected it to start at one"));
        }
      }
    }
    return parts;
  }
};

cudaError_t LaunchAdamWParts(const AdamWParts& parts, cudaStream_t stream) {
  for (const AdamW& args : parts) {
    if (const cudaError_t status = LaunchAdamW(args, stream); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace jfp4

JFP4_CUDA_HANDLER(Jfp4AdamwCuda, jfp4::AlignedAdamWCall, jfp4::LaunchAdamWParts);
