#include "cuda_ffi/ffi/adamw.h"

#include "cuda_ffi/ffi/launch.h"

JFP4_CUDA_HANDLER(Jfp4AdamwCuda, jfp4::AdamWCall, jfp4::LaunchAdamW);
