// A CUDA handler: reads its buffers, makes sure of the device, and launches on XLA's stream.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <string>

#include "cuda_ffi/ffi/checks.h"

namespace jfp4 {

using Stream = ffi::PlatformStream<cudaStream_t>;

inline ffi::Error CudaError(const char* target, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(target) + ": " + cudaGetErrorString(status));
}

// The kernels are built for one architecture. Asking costs no synchronisation, and only the first
// call on a device asks.
inline ffi::Error CheckDevice(const char* target) {
  constexpr int kHopper = 90, kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> capability{};
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) {
    return CudaError(target, status);
  }
  if (device >= kMaxDevices) {
    return ffi::Error::InvalidArgument(std::string(target) + ": device " + std::to_string(device) +
                                       "; expected one below 64");
  }
  int found = capability[device].load(std::memory_order_relaxed);
  if (found == 0) {
    int major = 0, minor = 0;
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    if (status != cudaSuccess) return CudaError(target, status);
    found = 10 * major + minor;
    capability[device].store(found, std::memory_order_relaxed);
  }
  if (found == kHopper) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(target) + ": device " + std::to_string(device) +
                                     " has compute capability " + std::to_string(found / 10) + "." +
                                     std::to_string(found % 10) + "; expected 9.0");
}

// `args`, if both operands of the product start at, and have rows of, a multiple of 16 bytes.
template <typename Args>
ffi::ErrorOr<Args> CheckCopies(const Args& args, Buffer a, Buffer b, int64_t row_bytes) {
  constexpr uintptr_t kBytes = 16;
  const auto aligned = [](Buffer buffer) {
    return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kBytes == 0;
  };
  if (aligned(a) && aligned(b) && row_bytes % kBytes == 0) return ffi::ErrorOr<Args>(args);
  return Refusal<Args>(ffi::Error::InvalidArgument(
      "a is " + Describe(a) + " and b " + Describe(b) +
      "; expected both to start at, and to have rows of, a multiple of 16 bytes"));
}

template <typename Call, auto kLaunch>
constexpr auto OnStream = [](cudaStream_t stream, auto... buffers) -> ffi::Error {
  auto args = Call::Read(buffers...);
  if (args.has_error()) return args.error();
  if (ffi::Error error = CheckDevice(Call::kTarget); error.failure()) return error;
  return CudaError(Call::kTarget, kLaunch(*args, stream));
};

}  // namespace jfp4

// Defines the handler `symbol` of a call. Launches depend on nothing but the buffers and
// attributes, so that XLA may record them in a CUDA graph.
#define JFP4_CUDA_HANDLER(symbol, Call, launch)                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, (::jfp4::OnStream<Call, launch>), \
                                Call::Bind<::jfp4::Stream>(),             \
                                {::xla::ffi::Traits::kCmdBufferCompatible})
