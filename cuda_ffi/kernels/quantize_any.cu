#include "cuda_ffi/kernels/quantize.cuh"
#include "cuda_ffi/kernels/quantize_any.h"

namespace jfp4 {
namespace {

constexpr int kAnyTile = 32;
constexpr int kAnyRows = 128;  // of a column that a thread searches
constexpr int kAnyThreads = 256;

__device__ __forceinline__ float AnyElement(const Any& args, int64_t batch, int64_t row,
                                            int64_t col) {
  const int64_t slice = batch * args.in.rows + row;
  float x = LoadElement(args.in.x, args.in.type, slice * args.in.cols + col);
  if (args.row_factor != nullptr) x = __fmul_rn(x, args.row_factor[slice]);
  if (args.col_factor != nullptr) x = __fmul_rn(x, args.col_factor[batch * args.in.cols + col]);
  return x;
}

template <Format kFormat>
__device__ __forceinline__ uint8_t CodeByte(const Outliers& outliers, float x, float scale,
                                            const Limits& limits) {
  if (isnan(scale)) return 0;
  const float inverse = __frcp_rn(scale);
  if (outliers.lo != nullptr) {
    return ToBytes<Carrier(kFormat, Clip::kCompensate)>(
        Code<kFormat, Clip::kCompensate>(x, inverse, limits), 0, 0, 0);
  }
  return ToBytes<Carrier(kFormat, Clip::kNone)>(Code<kFormat, Clip::kNone>(x, inverse, limits), 0,
                                                0, 0);
}

__device__ __forceinline__ uint8_t AnyCodeByte(const Any& args, float x, float scale,
                                               const Limits& limits) {
  switch (args.format) {
    case Format::kE2M1:
      return CodeByte<Format::kE2M1>(args.outliers, x, scale, limits);
    case Format::kE1M2:
      return CodeByte<Format::kE1M2>(args.outliers, x, scale, limits);
    case Format::kE3M0:
      return CodeByte<Format::kE3M0>(args.outliers, x, scale, limits);
    case Format::kE2M1B3:
      return CodeByte<Format::kE2M1B3>(args.outliers, x, scale, limits);
    case Format::kE4M3:
      return CodeByte<Format::kE4M3>(args.outliers, x, scale, limits);
    default:
      return CodeByte<Format::kE5M2>(args.outliers, x, scale, limits);
  }
}

// A block a row.
__global__ void __launch_bounds__(kAnyThreads) AnyRowScaleKernel(const __grid_constant__ Any args) {
  __shared__ uint32_t warp_amax[kAnyThreads / kWarp];
  const int64_t batch = blockIdx.x / args.in.rows, row = blockIdx.x % args.in.rows;
  const Limits limits = LoadLimits(args.outliers, batch);
  const int64_t cols = args.known_amax == nullptr ? args.in.cols : 0;  // to look at
  uint32_t amax = 0;
  for (int64_t col = threadIdx.x; col < cols; col += kAnyThreads) {
    amax = max(amax, ClippedMagnitude(AnyElement(args, batch, row, col), limits));
  }
  amax = WarpMax(amax);
  if (threadIdx.x % kWarp == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const uint32_t other : warp_amax) amax = max(amax, other);
    for (const float* least : {args.amax_floor, args.known_amax}) {
      if (least != nullptr) amax = max(amax, __float_as_uint(least[blockIdx.x]));
    }
    args.row_scale[blockIdx.x] = ScaleOf(amax, args.format);
  }
}

// A thread a column, over a chunk of the rows.
__global__ void __launch_bounds__(kAnyThreads)
    AnyColumnAmaxKernel(const __grid_constant__ Any args) {
  const uint32_t col_blocks = TileCount(args.in.cols, kAnyThreads);
  const uint32_t chunks = TileCount(args.in.rows, kAnyRows);
  const int64_t col = int64_t{blockIdx.x % col_blocks} * kAnyThreads + threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.x / col_blocks % chunks} * kAnyRows;
  const int64_t batch = blockIdx.x / (col_blocks * chunks);
  if (col >= args.in.cols) return;
  const Limits limits = LoadLimits(args.outliers, batch);
  uint32_t amax = 0;
  for (int64_t row = first_row; row < min(first_row + kAnyRows, args.in.rows); ++row) {
    amax = max(amax, ClippedMagnitude(AnyElement(args, batch, row, col), limits));
  }
  atomicMax(reinterpret_cast<uint32_t*>(args.col_amax + batch * args.in.cols + col), amax);
}

// Everything that is wanted of a tile of codes, from shared memory. Tiles start at even rows and
// columns, so no pair of nibbles is in two of them; past an edge the tile is zero.
__global__ void __launch_bounds__(kAnyThreads) AnyTileKernel(const __grid_constant__ Any args) {
  constexpr int kStep = kAnyThreads / kAnyTile;
  __shared__ uint8_t tile[kAnyTile][kAnyTile + 1];
  const int64_t rows = args.in.rows, cols = args.in.cols;
  const uint32_t col_tiles = TileCount(cols, kAnyTile);
  const uint32_t row_tiles = max(TileCount(rows, kAnyTile), 1u);
  const int64_t first_col = int64_t{blockIdx.x % col_tiles} * kAnyTile;
  const int64_t first_row = int64_t{blockIdx.x / col_tiles % row_tiles} * kAnyTile;
  const int64_t batch = blockIdx.x / (col_tiles * row_tiles);
  const int lane = threadIdx.x % kAnyTile, step = threadIdx.x / kAnyTile;
  const Limits limits = LoadLimits(args.outliers, batch);

  const int64_t col = first_col + lane;
  float col_scale = 0;
  if (args.row_scale == nullptr && col < cols) {
    const int64_t slice = batch * cols + col;
    const float* amax = args.known_amax == nullptr ? args.col_amax : args.known_amax;
    col_scale = ScaleOf(__float_as_uint(amax[slice]), args.format);
    if (first_row == 0 && step == 0) args.col_scale[slice] = col_scale;
  }
  for (int i = step; i < kAnyTile; i += kStep) {
    const int64_t row = first_row + i;
    uint8_t code = 0;
    if (row < rows && col < cols) {
      const int64_t slice = batch * rows + row;
      const float scale = args.row_scale == nullptr ? col_scale : args.row_scale[slice];
      code = AnyCodeByte(args, AnyElement(args, batch, row, col), scale, limits);
      if (args.codes != nullptr) args.codes[slice * cols + col] = code;
    }
    tile[i][lane] = code;
  }
  __syncthreads();

  for (int i = step; i < kAnyTile; i += kStep) {
    const bool even = lane % 2 == 0;
    if (first_col + i < cols && first_row + lane < rows) {
      const int64_t slice = batch * cols + first_col + i;
      if (args.codes_t != nullptr) args.codes_t[slice * rows + first_row + lane] = tile[lane][i];
      if (args.packed_t != nullptr && even) {
        args.packed_t[slice * ((rows + 1) / 2) + (first_row + lane) / 2] =
            ToNibbles(tile[lane][i] | tile[lane + 1][i] << 8);
      }
    }
    if (args.packed != nullptr && even && first_row + i < rows && col < cols) {
      args.packed[(batch * rows + first_row + i) * ((cols + 1) / 2) + col / 2] =
          ToNibbles(tile[i][lane] | tile[i][lane + 1] << 8);
    }
  }
}

// What AnyColumnAmaxKernel raises to the largest magnitudes.
cudaError_t StartAmax(float* amax, const float* floor, int64_t size, cudaStream_t stream) {
  const size_t bytes = size * sizeof(float);
  return floor == nullptr ? cudaMemsetAsync(amax, 0, bytes, stream)
                          : cudaMemcpyAsync(amax, floor, bytes, cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

cudaError_t LaunchAny(const Any& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  cudaError_t error = cudaSuccess;
  int64_t row_tiles = CeilDiv(in.rows, kAnyTile);
  if (args.row_scale != nullptr) {
    if (in.batch * in.rows == 0) return cudaSuccess;
    error = Launch(AnyRowScaleKernel, in.batch * in.rows, kAnyThreads, stream, args);
    if (error != cudaSuccess || in.cols == 0) return error;
  } else {
    if (in.batch * in.cols == 0) return cudaSuccess;
    if (args.known_amax == nullptr) {
      error = StartAmax(args.col_amax, args.amax_floor, in.batch * in.cols, stream);
    }
    if (error == cudaSuccess && in.rows > 0 && args.known_amax == nullptr) {
      const int64_t blocks = in.batch * CeilDiv(in.rows, kAnyRows) * CeilDiv(in.cols, kAnyThreads);
      error = Launch(AnyColumnAmaxKernel, blocks, kAnyThreads, stream, args);
    }
    if (error != cudaSuccess) return error;
    row_tiles = std::max<int64_t>(row_tiles, 1);  // a column without rows has a scale, too
  }
  return Launch(AnyTileKernel, in.batch * row_tiles * CeilDiv(in.cols, kAnyTile), kAnyThreads,
                stream, args);
}

}  // namespace jfp4
