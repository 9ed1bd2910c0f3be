#include "cuda_ffi/ffi/adamw.h"

#include <string>
#include <utility>

#include "cuda_ffi/ffi/launch.h"

namespace jfp4 {

// Where rows are whole blocks, a thread takes its elements 16 bytes at a time.
struct AlignedAdamWCall : AdamWCall {
  template <typename... Rest>
  static ffi::ErrorOr<AdamW> Read(Buffer grad, Buffer param, Buffer first, Buffer first_exponents,
                                  Buffer second, Rest... rest) {
    auto args = AdamWCall::Read(grad, param, first, first_exponents, second, rest...);
    if (args.has_error() || args->block() != AdamW::kBlock) return args;
    const std::pair<const char*, Buffer> wide[] = {
        {"grad", grad}, {"param", param}, {"first", first}, {"second", second}};
    for (const auto& [name, buffer] : wide) {
      if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
        return Refusal<AdamW>(
            ffi::Error::InvalidArgument(std::string(name) + " is " + Describe(buffer) +
                                        "; expected it to start at a multiple of 16 bytes"));
      }
    }
    return args;
  }
};

}  // namespace jfp4

JFP4_CUDA_HANDLER(Jfp4AdamwCuda, jfp4::AlignedAdamWCall, jfp4::LaunchAdamW);
