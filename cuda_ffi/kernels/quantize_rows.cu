// A scale a row: the row waits in registers for its scale. The other layout of its codes is
// transposed by a second kernel, which reads half of them from L2.
#include "cuda_ffi/kernels/quantize.cuh"
#include "cuda_ffi/kernels/quantize_any.h"

namespace jfp4 {
namespace {

constexpr int kMaxThreads = 1024;

// Elements of one row that a thread of RowsKernel holds.
constexpr int kHeld = 32;
template <DType kType>
constexpr int kVectorsHeld = kHeld / kPerVector<kType>;

// A block a row, which waits in registers for its scale.
template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(kMaxThreads)
    RowsKernel(const __grid_constant__ QuantizeRows args) {
  constexpr int kElements = kPerVector<kType>, kVectors = kVectorsHeld<kType>;
  __shared__ uint32_t warp_amax[kMaxThreads / kWarp];
  const int64_t row = blockIdx.x, batch = row / args.in.rows;
  const int vectors = static_cast<int>(args.in.cols / kElements);
  const uint4* x = static_cast<const uint4*>(args.in.x) + row * vectors;

  uint4 held[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    held[i] = vector < vectors ? __ldcs(x + vector) : uint4{};
  }
  Limits limits = {};
  if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, batch);
  Extremes<kType, kClip> extremes;
#pragma unroll
  for (const uint4& vector : held) {
    extremes.Include(vector.x);
    extremes.Include(vector.y);
    extremes.Include(vector.z);
    extremes.Include(vector.w);
  }
  uint32_t amax = WarpMax(extremes.Magnitude(limits));
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  amax = WarpMax(lane < blockDim.x / kWarp ? warp_amax[lane] : 0);
  if (args.amax_floor != nullptr) amax = max(amax, __float_as_uint(args.amax_floor[row]));

  LetNextBegin();  // whose blocks take a while to be there
  const float scale = ScaleOf(amax, kFormat);
  if (threadIdx.x == 0) args.scale[row] = scale;
  const float inverse = __frcp_rn(scale);
  const ScaledLimits scaled_limits = Scaled(limits, inverse);
  Scaling<kElements> scaling;
  scaling.SetAll(inverse);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
    uint32_t words[kElements / 4];
    const int64_t at = (row * vectors + vector) * kElements;
    if (args.codes != nullptr) {
      EncodeVector<kType, kFormat, kClip>(held[i], scaling, scaled_limits, words);
      StoreBytes(args.codes + at, words);
    }
    if constexpr (kFormat == Format::kE2M1 && kClip == Clip::kNone) {
      if (args.packed == nullptr) continue;
      EncodeVector<kType, kFormat, kClip>(held[i], scaling, scaled_limits, words, kSmall);
      StoreNibbles</*kAreSmall=*/true>(args.packed + at / 2, words);
    }
  }
}

// --- the transpose of codes ---

// codes_t from codes, [batch, rows, cols].
__global__ void __launch_bounds__(kTileThreads)
    TransposeKernel(const uint8_t* codes, int64_t rows, int64_t cols, uint8_t* codes_t) {
  constexpr int kLanes = kTile / kVectorBytes;  // that have a row of the tile
  constexpr int kRowsAtOnce = kTileThreads / kLanes;
  constexpr int kLoads = kTile / kRowsAtOnce;
  __shared__ __align__(16) uint32_t tile[kTile * kTileStride];
  // From the last tile to the first: the end of the codes is what the pass before has left in L2.
  const Place at(gridDim.x - 1 - blockIdx.x, rows, cols, kTile, kTile);
  const int col = threadIdx.x % kLanes * kVectorBytes, lane_row = threadIdx.x / kLanes;

  const uint8_t* from = codes + (at.batch * rows + at.first_row) * cols + at.first_col + col;
  WaitForLast();
  uint4 held[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = lane_row + i * kRowsAtOnce;
    held[i] = row < at.rows && col < at.cols
                  ? __ldcs(reinterpret_cast<const uint4*>(from + row * cols))
                  : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = lane_row + i * kRowsAtOnce;
    *reinterpret_cast<uint4*>(tile + TileWord(row, col / 4)) = held[i];
  }
  __syncthreads();
  StoreTransposed(tile, at.rows, at.cols, rows,
                  codes_t + (at.batch * cols + at.first_col) * rows + at.first_row);
}

// --- launching ---

// Rows that a block's registers hold.
cudaError_t LaunchRows(const QuantizeRows& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  const int threads = RoundUp(CeilDiv(in.cols, kHeld), kWarp);
  return WithAll(in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
    return Launch(RowsKernel<type(), format(), clip()>, in.batch * in.rows, threads, stream, args);
  });
}

cudaError_t LaunchTranspose(const QuantizeInput& in, const uint8_t* codes, uint8_t* codes_t,
                            cudaStream_t stream) {
  return LaunchEarly(TransposeKernel, TileBlocks(in), kTileThreads, stream, codes, in.rows, in.cols,
                     codes_t);
}

}  // namespace

cudaError_t LaunchQuantizeRows(const QuantizeRows& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasVectors(in, args.codes, args.packed)) {
    const bool transposes = args.codes_t != nullptr;
    const bool can = args.codes != nullptr && in.cols % kVectorBytes == 0 &&
                     IsAligned(args.codes, kVectorBytes) && HasGroups(in, args.codes_t, nullptr);
    if (in.cols <= kMaxThreads * kHeld && (can || !transposes)) {
      const cudaError_t error = LaunchRows(args, stream);
      if (error != cudaSuccess || !transposes) return error;
      return LaunchTranspose(in, args.codes, args.codes_t, stream);
    }
  }
  Any any = {in, args.outliers, args.format};
  any.row_scale = args.scale;
  any.amax_floor = args.amax_floor;
  any.codes = args.codes;
  any.codes_t = args.codes_t;
  any.packed = args.packed;
  return LaunchAny(any, stream);
}

}  // namespace jfp4
