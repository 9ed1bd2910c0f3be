#include "cuda_ffi/ffi/rms_norm.h"

#include "cuda_ffi/ffi/launch.h"

JFP4_CUDA_HANDLER(Jfp4RmsNormCuda, jfp4::RmsNormCall, jfp4::LaunchRmsNorm);
JFP4_CUDA_HANDLER(Jfp4RmsNormGradientCuda, jfp4::RmsNormGradientCall, jfp4::LaunchRmsNormGradient);
