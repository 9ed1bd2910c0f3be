// Stands in for the CUDA toolkit's header where there is none: the kernels' headers, which also say
// what the host handlers take, name these two of its types.
#pragma once

enum cudaError : int;
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;
