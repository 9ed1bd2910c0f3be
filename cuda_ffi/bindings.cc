// The Python module jfp4._kernels: hands the handlers to jfp4/ops/ffi.py, which registers them.
#include <pybind11/pybind11.h>

#include "xla/ffi/api/c_api.h"
#ifdef JFP4_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

// Operands, results and attributes of the targets as a number: ffi.py asks for the same one, so
// that a module left over from another version is found out. Raise both when any of them changes.
constexpr int kInterface = 14;

// Every target, and the name of its handlers less the platform.
#define JFP4_TARGETS(X)                           \
  X(jfp4_quantize_rows, Jfp4QuantizeRows)         \
  X(jfp4_quantize_columns, Jfp4QuantizeColumns)   \
  X(jfp4_gradient_amax, Jfp4GradientAmax)         \
  X(jfp4_quantize_gradient, Jfp4QuantizeGradient) \
  X(jfp4_thresholds, Jfp4Thresholds)              \
  X(jfp4_gemm, Jfp4Gemm)                          \
  X(jfp4_packed_gemm, Jfp4PackedGemm)             \
  X(jfp4_adamw, Jfp4Adamw)                        \
  X(jfp4_rms_norm, Jfp4RmsNorm)                   \
  X(jfp4_rms_norm_gradient, Jfp4RmsNormGradient)

extern "C" {
#define JFP4_DECLARE(target, handler)              \
  XLA_FFI_Error* handler##Cpu(XLA_FFI_CallFrame*); \
  XLA_FFI_Error* handler##Cuda(XLA_FFI_CallFrame*);
JFP4_TARGETS(JFP4_DECLARE)
#undef JFP4_DECLARE
}

namespace {

py::dict Registrations() {
  const auto capsule = [](XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
    return py::capsule(reinterpret_cast<void*>(handler));
  };
  py::dict cpu, cuda;
#define JFP4_CPU(target, handler) cpu[#target] = capsule(handler##Cpu);
  JFP4_TARGETS(JFP4_CPU)
#ifdef JFP4_CUDA
#define JFP4_CUDA_TARGET(target, handler) cuda[#target] = capsule(handler##Cuda);
  JFP4_TARGETS(JFP4_CUDA_TARGET)
#endif
  py::dict all;
  all["cpu"] = cpu;
  all["CUDA"] = cuda;
  return all;
}

// Versions of CUDA, as 1000 * major + 10 * minor: what the kernels were built with, and what the
// driver that is here has; 0 without either.
py::tuple CudaVersions() {
  int built = 0, driver = 0;
#ifdef JFP4_CUDA
  built = CUDART_VERSION;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
#endif
  return py::make_tuple(built, driver);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "XLA FFI handlers of jfp4, by platform and target.";
  m.attr("interface") = kInterface;
  // Whose headers these handlers were built with: XLA takes them up to its own version.
  m.attr("jaxlib") = JFP4_JAXLIB_VERSION;
  m.def("registrations", &Registrations,
        "Capsules of the handlers, {platform: {target: capsule}}; none for CUDA where the module "
        "was built without a CUDA compiler.");
  m.def(
      "cuda_versions", &CudaVersions,
      "CUDA's version that the module was built with and the driver's, 13.1 as 13010; 0 is none.");
}
