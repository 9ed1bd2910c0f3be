// A gradient for both of its products: a scale a row and one a column, each of its own product. No
// element has a code before all of its row and of its column are known, so the gradient is read
// twice: for the largest magnitudes, then, backwards, for the codes of both layouts.
#include <limits>

#include "cuda_ffi/kernels/quantize.cuh"
#include "cuda_ffi/kernels/quantize_any.h"
#include "cuda_ffi/kernels/tile_counter.cuh"

namespace jfp4 {
namespace {

constexpr int kInFlight = 4;  // loads of a thread

// The end of the gradient that is to stay in L2 between the passes.
constexpr int kKeptBytes = 24 << 20;

// The magnitudes as the integers that their bits are.
__device__ __forceinline__ uint32_t* BitsOf(float* amax) {
  return reinterpret_cast<uint32_t*>(amax);
}
__device__ __forceinline__ const uint32_t* BitsOf(const float* amax) {
  return reinterpret_cast<const uint32_t*>(amax);
}

// Returns when all magnitudes of a matrix are zero, which the warp sees to whose block comes first.
// One warp of each of its blocks calls it, once. (Behind a kernel that does it ahead, and outside
// of a graph, the pass waits for the host to launch it.)
__device__ __forceinline__ void ZeroOnce(const GradientAmax& args, int64_t batch, uint32_t blocks) {
  const int lane = threadIdx.x % kWarp;
  TileCounter* const counter = args.counters + batch;
  const bool first = lane == 0 && ComesFirst(counter);
  if (__any_sync(~0u, first)) {
    float* const row_amax = args.row_amax + batch * args.in.rows;
    float* const col_amax = args.col_amax + batch * args.in.cols;
    for (int64_t i = lane; i < args.in.rows; i += kWarp) row_amax[i] = 0;
    for (int64_t i = lane; i < args.in.cols; i += kWarp) col_amax[i] = 0;
    __syncwarp();
    if (first && blocks > 1) Start(counter);
    if (first && blocks == 1) SetState(counter, 0);
  } else if (lane == 0) {
    TakeNext(counter, blocks - 1);
  }
}

template <int kElements>
__device__ __forceinline__ void LoadFactors(const float* from, float (&factors)[kElements]) {
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
    factors[i] = four.x;
    factors[i + 1] = four.y;
    factors[i + 2] = four.z;
    factors[i + 3] = four.w;
  }
}

// First pass. A block has some rows of a strip of columns, its warps as many of them each, lanes
// the vectors of a row. Raises magnitudes.
constexpr int kAmaxWarps = kTileThreads / kWarp;
constexpr int kAmaxBlocks = 4;      // on a multiprocessor
constexpr int kAmaxMostRows = 128;  // of a warp
template <DType kType>
constexpr int kAmaxCols = kWarp * kPerVector<kType>;

template <DType kType>
__global__ void __launch_bounds__(kTileThreads, kAmaxBlocks)
    GradientAmaxKernel(const __grid_constant__ GradientAmax args, const int warp_rows,
                       const uint32_t matrix_blocks) {
  constexpr int kElements = kPerVector<kType>, kCols = kAmaxCols<kType>;
  static_assert(kWarp % kInFlight == 0 && kCols <= kTileThreads);
  __shared__ uint32_t of_rows[kAmaxWarps * kAmaxMostRows], of_cols[kAmaxWarps][kCols];
  const Place at(blockIdx.x, args.in.rows, args.in.cols, kAmaxWarps * warp_rows, kCols);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warp_row = warp * warp_rows;
  const int64_t first_row = at.batch * args.in.rows + at.first_row;
  const int64_t first_col = at.batch * args.in.cols + at.first_col;
  const int rows = min(at.rows - warp_row, warp_rows), col = lane * kElements;
  const bool inside = col < at.cols;

  const int64_t pitch = args.in.cols / kElements;
  const uint4* from = static_cast<const uint4*>(args.in.x) + (first_row + warp_row) * pitch +
                      (at.first_col + col) / kElements;
  const int64_t kept = kKeptBytes / (args.in.cols * ElementBytes(kType));
  const bool keep = first_row + warp_row + kept >= args.in.batch * args.in.rows;
  float col_factor[kElements] = {}, largest[kElements] = {};
  LetNextBegin();  // whose blocks are there then when the last of these end
  if (inside) LoadFactors(args.col_factor + first_col + col, col_factor);

  if (warp == 0) ZeroOnce(args, at.batch, matrix_blocks);
  // A lane has the factor of a row, and in the end its largest magnitude.
#pragma unroll 1
  for (int done = 0; done < rows; done += kWarp) {
    const int row = warp_row + done + lane;
    const float row_factor = done + lane < rows ? __ldg(args.row_factor + first_row + row) : 0;
    uint32_t own = 0;
#pragma unroll 1
    for (int first = 0; first < kWarp && done + first < rows; first += kInFlight) {
      uint4 held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i, from += pitch) {
        const bool there = inside && done + first + i < rows;
        held[i] = !there ? uint4{} : keep ? __ldg(from) : __ldcs(from);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const float of_all = __shfl_sync(~0u, row_factor, first + i);
        float v[kElements], of_row = 0;
        Unpack<kType>(held[i], v);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          of_row = MaxOrNaN(of_row, fabsf(__fmul_rn(v[j], col_factor[j])));
          largest[j] = MaxOrNaN(largest[j], fabsf(__fmul_rn(v[j], of_all)));
        }
        const uint32_t all = WarpMax(__float_as_uint(of_row));
        if (lane == first + i) own = all;
      }
    }
    if (done + lane < rows) of_rows[row] = own;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    of_cols[warp][col + i] = inside ? __float_as_uint(largest[i]) : 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < at.rows; i += kTileThreads) {
    atomicMax(BitsOf(args.row_amax) + first_row + i, of_rows[i]);
  }
  if (threadIdx.x < at.cols) {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kAmaxWarps; ++i) all = max(all, of_cols[i][threadIdx.x]);
    atomicMax(BitsOf(args.col_amax) + first_col + threadIdx.x, all);
  }
}

// Blocks of a matrix.
int64_t AmaxBlocks(const QuantizeInput& in, int rows, int cols) {
  return CeilDiv(in.rows, rows) * CeilDiv(in.cols, cols);
}

// Rows of a warp, so that all blocks come in as few turns as their rows are worth.
cudaError_t ChooseAmaxRows(const QuantizeInput& in, int cols, int* warp_rows) {
  constexpr int kBegin = 8;  // rows in the time that a block takes to begin and to end
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int rows = kInFlight; rows <= kAmaxMostRows; rows += kInFlight) {
    const int64_t blocks = in.batch * AmaxBlocks(in, kAmaxWarps * rows, cols);
    const int64_t cost = CeilDiv(blocks, kAmaxBlocks * multiprocessors) * (rows + kBegin);
    if (cost >= least) continue;
    least = cost;
    *warp_rows = rows;
  }
  return cudaSuccess;
}

// The same of any shape and alignment: a warp has a row of a strip of columns at a time.
constexpr int kAnyAmaxRows = 128;

__global__ void __launch_bounds__(kTileThreads)
    AnyGradientAmaxKernel(const __grid_constant__ GradientAmax args, const uint32_t matrix_blocks) {
  const Place at(blockIdx.x, args.in.rows, args.in.cols, kAnyAmaxRows, kWarp);
  const int lane = threadIdx.x % kWarp;
  uint32_t* const row_amax = BitsOf(args.row_amax) + at.batch * args.in.rows;
  uint32_t* const col_amax = BitsOf(args.col_amax) + at.batch * args.in.cols;
  const int64_t col = at.first_col + lane;
  float largest = 0;
  if (threadIdx.x < kWarp) ZeroOnce(args, at.batch, matrix_blocks);
  __syncthreads();
  for (int i = threadIdx.x / kWarp; i < at.rows; i += kTileThreads / kWarp) {
    const int64_t row = at.first_row + i, slice = at.batch * args.in.rows + row;
    float of_row = 0;
    if (lane < at.cols) {
      const float v = LoadElement(args.in.x, args.in.type, slice * args.in.cols + col);
      of_row = fabsf(__fmul_rn(v, args.col_factor[at.batch * args.in.cols + col]));
      largest = MaxOrNaN(largest, fabsf(__fmul_rn(v, args.row_factor[slice])));
    }
    const uint32_t all = WarpMax(__float_as_uint(of_row));
    if (lane == 0) atomicMax(row_amax + row, all);
  }
  if (lane < at.cols) atomicMax(col_amax + col, __float_as_uint(largest));
}

// Second pass: the codes, those of the columns by way of a tile.
template <DType kType, Format kFormat>
__global__ void __launch_bounds__(kTileThreads, 4)
    GradientTileKernel(const __grid_constant__ QuantizeGradient args) {
  constexpr int kElements = kPerVector<kType>;
  constexpr int kLanes = kTile / kElements;  // that have a row of the tile
  constexpr int kRowsAtOnce = kTileThreads / kLanes;
  constexpr int kChunkRows = kInFlight * kRowsAtOnce;
  static_assert(kTile % kChunkRows == 0);
  __shared__ __align__(16) uint32_t tile[kTile * kTileStride];
  __shared__ float row_inverses[kTile], row_factors[kTile];

  // From the last tile to the first: the end of dy is what the pass before has left in L2.
  const Place at(gridDim.x - 1 - blockIdx.x, args.in.rows, args.in.cols, kTile, kTile);
  const int col = threadIdx.x % kLanes * kElements, lane_row = threadIdx.x / kLanes;
  const bool inside = col < at.cols;

  const int64_t origin =
      (at.batch * args.in.rows + at.first_row) * args.in.cols + at.first_col + col;
  const uint4* x = static_cast<const uint4*>(args.in.x) + origin / kElements;
  const int64_t vectors = args.in.cols / kElements;
  uint4 held[kInFlight];
  const auto load = [&](int row) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int r = row + i * kRowsAtOnce;
      held[i] = inside && r < at.rows ? __ldcs(x + r * vectors) : uint4{};
    }
  };
  WaitForLast();  // which found the magnitudes, if nothing else was between
  load(lane_row);
  if (threadIdx.x < at.rows) {
    const int64_t row = at.first_row + threadIdx.x, slice = at.batch * args.in.rows + row;
    const float scale = ScaleOf(BitsOf(args.row_amax)[slice], kFormat);
    row_inverses[threadIdx.x] = __frcp_rn(scale);
    row_factors[threadIdx.x] = args.row_factor[slice];
    if (at.first_col == 0) args.row_scale[slice] = scale;
  }
  Scaling<kElements> by_col;
  float col_factor[kElements];
  if (inside) {
    const int64_t slice = at.batch * args.in.cols + at.first_col + col;
    float inverses[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float scale = ScaleOf(BitsOf(args.col_amax)[slice + i], kFormat);
      inverses[i] = __frcp_rn(scale);
      if (at.first_row == 0 && lane_row == 0) args.col_scale[slice + i] = scale;
    }
    by_col.SetEach(inverses);
    LoadFactors(args.col_factor + slice, col_factor);
  }
  __syncthreads();

#pragma unroll
  for (int chunk = 0; chunk < kTile; chunk += kChunkRows) {
    if (chunk > 0) load(chunk + lane_row);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = chunk + lane_row + i * kRowsAtOnce;
      if (!inside || row >= at.rows) break;
      float v[kElements], product[kElements];
      uint32_t words[kElements / 4];
      Unpack<kType>(held[i], v);
      Scaling<kElements> by_row;
      by_row.SetAll(row_inverses[row]);
#pragma unroll
      for (int j = 0; j < kElements; ++j) product[j] = __fmul_rn(v[j], col_factor[j]);
      Encode<kFormat, Clip::kNone>(product, by_row, Limits{}, words);
      StoreBytes</*kStreams=*/true>(args.codes + origin + row * args.in.cols, words);
#pragma unroll
      for (int j = 0; j < kElements; ++j) product[j] = __fmul_rn(v[j], row_factors[row]);
      Encode<kFormat, Clip::kNone>(product, by_col, Limits{}, words);
      StoreBytes(tile + TileWord(row, col / 4), words);
    }
  }
  __syncthreads();
  StoreTransposed</*kStreams=*/true>(
      tile, at.rows, at.cols, args.in.rows,
      args.codes_t + (at.batch * args.in.cols + at.first_col) * args.in.rows + at.first_row);
}

cudaError_t LaunchGradientTiles(const QuantizeGradient& args, cudaStream_t stream) {
  return WithType(args.in.type, [&](auto type) {
    return WithFormat(args.format, [&](auto format) {
      return LaunchEarly(GradientTileKernel<type(), format()>, TileBlocks(args.in), kTileThreads,
                         stream, args);
    });
  });
}

cudaError_t LaunchAnyGradient(const QuantizeGradient& args, cudaStream_t stream) {
  Any rows = {args.in, {}, args.format};
  rows.col_factor = args.col_factor;
  rows.row_scale = args.row_scale;
  rows.known_amax = args.row_amax;
  rows.codes = args.codes;
  Any columns = {args.in, {}, args.format};
  columns.row_factor = args.row_factor;
  columns.col_scale = args.col_scale;
  columns.known_amax = args.col_amax;
  columns.codes_t = args.codes_t;
  const cudaError_t error = LaunchAny(rows, stream);
  return error == cudaSuccess ? LaunchAny(columns, stream) : error;
}

// Whether a thread can take vectors, of the gradient and of its factors.
bool TakesVectors(const QuantizeInput& in, const float* col_factor, const uint8_t* codes) {
  return HasVectors(in, codes, nullptr) && IsAligned(col_factor, sizeof(float4));
}

}  // namespace

cudaError_t LaunchGradientAmax(const GradientAmax& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch * in.rows * in.cols == 0) {
    const cudaError_t error =
        cudaMemsetAsync(args.row_amax, 0, in.batch * in.rows * sizeof(float), stream);
    if (error != cudaSuccess) return error;
    return cudaMemsetAsync(args.col_amax, 0, in.batch * in.cols * sizeof(float), stream);
  }
  if (!TakesVectors(in, args.col_factor, nullptr)) {
    const int64_t blocks = AmaxBlocks(in, kAnyAmaxRows, kWarp);
    return Launch(AnyGradientAmaxKernel, in.batch * blocks, kTileThreads, stream, args, blocks);
  }
  return WithType(in.type, [&](auto type) {
    constexpr int kCols = kAmaxCols<type()>;
    int warp_rows = 0;
    const cudaError_t error = ChooseAmaxRows(in, kCols, &warp_rows);
    if (error != cudaSuccess) return error;
    const int64_t blocks = AmaxBlocks(in, kAmaxWarps * warp_rows, kCols);
    return Launch(GradientAmaxKernel<type()>, in.batch * blocks, kTileThreads, stream, args,
                  warp_rows, blocks);
  });
}

cudaError_t LaunchQuantizeGradient(const QuantizeGradient& args, cudaStream_t stream) {
  if (args.in.batch == 0) return cudaSuccess;
  if (!TakesVectors(args.in, args.col_factor, args.codes) ||
      !HasGroups(args.in, args.codes_t, nullptr)) {
    return LaunchAnyGradient(args, stream);
  }
  return LaunchGradientTiles(args, stream);
}

}  // namespace jfp4
