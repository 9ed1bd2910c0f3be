#include "cuda_ffi/ffi/quantize.h"

#include "cuda_ffi/ffi/launch.h"

JFP4_CUDA_HANDLER(Jfp4QuantizeRowsCuda, jfp4::QuantizeRowsCall, jfp4::LaunchQuantizeRows);
JFP4_CUDA_HANDLER(Jfp4QuantizeColumnsCuda, jfp4::QuantizeColumnsCall, jfp4::LaunchQuantizeColumns);
JFP4_CUDA_HANDLER(Jfp4GradientAmaxCuda, jfp4::GradientAmaxCall, jfp4::LaunchGradientAmax);
JFP4_CUDA_HANDLER(Jfp4QuantizeGradientCuda, jfp4::QuantizeGradientCall,
                  jfp4::LaunchQuantizeGradient);
