#include "cuda_ffi/ffi/thresholds.h"

#include "cuda_ffi/ffi/launch.h"

JFP4_CUDA_HANDLER(Jfp4ThresholdsCuda, jfp4::ThresholdsCall, jfp4::LaunchThresholds);
