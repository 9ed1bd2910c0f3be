// Quantisation is bound by memory: each kernel reads its input as few times as its reduction allows
// and writes every layout in whole 32-byte sectors.
//
//   RowsKernel        a scale a row: the row waits in registers for its scale.
//   TransposeKernel   the other layout of its codes.
//   ColumnAmaxKernel  a scale a column, first pass: the largest magnitudes.
//   TileKernel        a scale a column, second pass: the codes, transposed in tiles.
//   Gradient...       a scale a row and one a column, each of its own product: the same two passes.
//   Any...Kernel      the same for any shape, alignment, type and format, chosen at run time.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/quantize.h"

namespace jfp4 {
namespace {

constexpr int kMaxThreads = 1024;

// --- pieces ---

// Elements in the 16 bytes that a thread loads at once.
constexpr int kVectorBytes = 16;
template <DType kType>
constexpr int kPerVector = kVectorBytes / ElementBytes(kType);

// Elements of one row that a thread of RowsKernel holds.
constexpr int kHeld = 32;
template <DType kType>
constexpr int kVectorsHeld = kHeld / kPerVector<kType>;

// Tiles are counted in 32 bits, as blocks are.
__device__ __forceinline__ uint32_t TileCount(int64_t size, int tile) {
  return static_cast<uint32_t>((size + tile - 1) / tile);
}

// Where a block's part of its matrix lies: parts of part_rows x part_cols in row-major order,
// matrix after matrix, those at the edges smaller.
struct Place {
  int64_t batch, first_row, first_col;
  int rows, cols;

  __device__ __forceinline__ Place(uint32_t index, int64_t all_rows, int64_t all_cols,
                                   int part_rows, int part_cols) {
    const uint32_t across = TileCount(all_cols, part_cols), down = TileCount(all_rows, part_rows);
    first_col = int64_t{index % across} * part_cols;
    first_row = int64_t{index / across % down} * part_rows;
    batch = index / (across * down);
    rows = static_cast<int>(min(all_rows - first_row, int64_t{part_rows}));
    cols = static_cast<int>(min(all_cols - first_col, int64_t{part_cols}));
  }
};

__device__ __forceinline__ uint32_t WarpMax(uint32_t v) { return __reduce_max_sync(~0u, v); }

// The limits of a matrix; an absent one limits nothing.
__device__ __forceinline__ Limits LoadLimits(const Outliers& outliers, int64_t batch) {
  const float infinity = __uint_as_float(kInfinityBits);
  return {outliers.lo == nullptr ? -infinity : outliers.lo[batch],
          outliers.hi == nullptr ? infinity : outliers.hi[batch]};
}

template <DType kType>
__device__ __forceinline__ void Unpack(const uint4& vector, float (&x)[kPerVector<kType>]) {
  constexpr int kElements = Word<kType>::kElements;
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < kPerVector<kType>; ++i) {
    x[i] = Word<kType>::Get(words[i / kElements], i % kElements);
  }
}

template <DType kType>
__device__ __forceinline__ void Include(Extremes<kType>& extremes, const uint4& vector) {
  extremes.Include(vector.x);
  extremes.Include(vector.y);
  extremes.Include(vector.z);
  extremes.Include(vector.w);
}

// How each element of a vector is scaled. `keep` has a byte an element: all ones, or zero where the
// scale is NaN, which makes the code zero.
template <int kElements>
struct Scaling {
  float inverse[kElements];
  uint32_t keep[kElements / 4];

  // One scale for all of them.
  __device__ __forceinline__ void Set(float scale) {
    const float reciprocal = __frcp_rn(scale);
#pragma unroll
    for (float& i : inverse) i = reciprocal;
#pragma unroll
    for (uint32_t& k : keep) k = isnan(scale) ? 0u : ~0u;
  }

  __device__ __forceinline__ void SetEach(const float (&scale)[kElements]) {
#pragma unroll
    for (uint32_t& k : keep) k = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      inverse[i] = __frcp_rn(scale[i]);
      keep[i / 4] |= isnan(scale[i]) ? 0u : 0xFFu << i % 4 * 8;
    }
  }
};

template <Format kFormat, Clip kClip, int kElements>
__device__ __forceinline__ void Encode(const float (&x)[kElements],
                                       const Scaling<kElements>& scaling, const Limits& limits,
                                       uint32_t (&words)[kElements / 4]) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    float code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      code[j] = Code<kFormat, kClip>(x[4 * i + j], scaling.inverse[4 * i + j], limits);
    }
    words[i] =
        scaling.keep[i] & ToBytes<Carrier(kFormat, kClip)>(code[0], code[1], code[2], code[3]);
  }
}

// Codes to an address aligned to their size.
template <int kWords>
__device__ __forceinline__ void StoreBytes(void* to, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    *static_cast<uint32_t*>(to) = words[0];
  }
}

// The same codes as nibbles.
template <int kWords>
__device__ __forceinline__ void StoreNibbles(void* to, const uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) {
    *static_cast<uint16_t*>(to) = static_cast<uint16_t>(ToNibbles(words[0]));
  } else {
    uint32_t nibbles[kWords / 2];
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      nibbles[i] = ToNibbles(words[2 * i]) | ToNibbles(words[2 * i + 1]) << 16;
    }
    StoreBytes(to, nibbles);
  }
}

// Tiles of codes wait in shared memory to be read by column: four columns, a word, of a group of 16
// rows, by a thread, the groups of a tile by adjacent lanes, so that a warp writes whole columns of
// the tile. Its row stride being a multiple of all 32 banks, the words of group g are moved by
// g * kGroupShift, which gives each lane a bank of its own.
constexpr int kGroupRows = 16;
constexpr int kBanks = 32;
template <int kTileRows>
constexpr int kGroupShift = kBanks / (kTileRows / kGroupRows);

template <int kTileRows>
__device__ __forceinline__ int TileWord(int row, int word) {
  return word ^ row / kGroupRows * kGroupShift<kTileRows>;
}

// Writes the columns that this thread has of a tile of `rows` x `cols` codes, a multiple of
// kGroupRows by one of four. Column c of the tile starts at codes_t + c * pitch, and in nibbles at
// packed_t + c * pitch / 2; either may be null.
template <int kTileRows>
__device__ __forceinline__ void StoreTransposed(const uint32_t* tile, int stride_words, int rows,
                                                int cols, int64_t pitch, uint8_t* codes_t,
                                                uint8_t* packed_t) {
  constexpr int kGroups = kTileRows / kGroupRows;
  for (int item = threadIdx.x; item < kGroups * (cols / 4); item += blockDim.x) {
    const int row = item % kGroups * kGroupRows, word = item / kGroups;
    if (row >= rows) continue;
    const uint32_t* from = tile + row * stride_words + TileWord<kTileRows>(row, word);
    uint32_t columns[4][kGroupRows / 4];
#pragma unroll
    for (int i = 0; i < kGroupRows / 4; ++i) {
      uint32_t in[4], out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) in[j] = from[(4 * i + j) * stride_words];
      TransposeBytes(in, out);
#pragma unroll
      for (int j = 0; j < 4; ++j) columns[j][i] = out[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t at = (4 * word + j) * pitch + row;
      if (codes_t != nullptr) StoreBytes(codes_t + at, columns[j]);
      if (packed_t != nullptr) StoreNibbles(packed_t + at / 2, columns[j]);
    }
  }
}

// --- a scale a row ---

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
  Extremes<kType> extremes;
#pragma unroll
  for (const uint4& vector : held) Include(extremes, vector);
  uint32_t amax = WarpMax(extremes.template Magnitude<kClip>(limits));
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  amax = WarpMax(lane < blockDim.x / kWarp ? warp_amax[lane] : 0);
  if (args.amax_floor != nullptr) amax = max(amax, __float_as_uint(args.amax_floor[row]));

  const float scale = ScaleOf(amax, kFormat);
  if (threadIdx.x == 0) args.scale[row] = scale;
  Scaling<kElements> scaling;
  scaling.Set(scale);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
    float v[kElements];
    Unpack<kType>(held[i], v);
    uint32_t words[kElements / 4];
    Encode<kFormat, kClip>(v, scaling, limits, words);
    const int64_t at = (row * vectors + vector) * kElements;
    if (args.codes != nullptr) StoreBytes(args.codes + at, words);
    if (args.packed != nullptr) StoreNibbles(args.packed + at / 2, words);
  }
}

// --- the transpose of codes ---

constexpr int kTile = 128;
constexpr int kTransposeThreads = 256;

// codes_t from codes, [batch, rows, cols]. To write both layouts in one pass, 32 rows of x would
// have to wait in shared memory, a cluster's, for their scales: reading the codes once more, half
// from L2, is faster by a third.
__global__ void __launch_bounds__(kTransposeThreads)
    TransposeKernel(const uint8_t* codes, int64_t rows, int64_t cols, uint8_t* codes_t) {
  constexpr int kStride = kTile / 4;  // words
  constexpr int kLanes = kTile / kVectorBytes;
  constexpr int kLoads = kTile / (kTransposeThreads / kLanes);
  __shared__ __align__(16) uint32_t tile[kTile * kStride];
  // From the last tile to the first: the end of the codes is what the pass before has left in L2.
  const Place at(gridDim.x - 1 - blockIdx.x, rows, cols, kTile, kTile);
  const int col = threadIdx.x % kLanes * kVectorBytes;

  const uint8_t* from = codes + (at.batch * rows + at.first_row) * cols + at.first_col + col;
  uint4 held[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = threadIdx.x / kLanes + i * (kTransposeThreads / kLanes);
    held[i] = row < at.rows && col < at.cols
                  ? __ldcs(reinterpret_cast<const uint4*>(from + row * cols))
                  : uint4{};
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = threadIdx.x / kLanes + i * (kTransposeThreads / kLanes);
    *reinterpret_cast<uint4*>(tile + row * kStride + TileWord<kTile>(row, col / 4)) = held[i];
  }
  __syncthreads();
  StoreTransposed<kTile>(tile, kStride, at.rows, at.cols, rows,
                         codes_t + (at.batch * cols + at.first_col) * rows + at.first_row, nullptr);
}

// --- a scale a column ---

constexpr int kColumnThreads = 256;
constexpr int kInFlight = 4;  // loads of a thread

// Lanes have the vectors of a row, warps the rows of a chunk in turn. Adds to args.amax, whose
// values are compared as integers.
constexpr int kAmaxRows = 128;
static_assert(kAmaxRows % (kInFlight * kColumnThreads / kWarp) == 0);

template <DType kType>
constexpr int kAmaxCols = kWarp * kPerVector<kType>;

// Raises amax[0, count) to what the warps found.
template <int kWarps, int kCols>
__device__ __forceinline__ void AddColumns(const uint32_t (&magnitudes)[kWarps][kCols], float* amax,
                                           int64_t count) {
  static_assert(kCols <= kColumnThreads);
  if (threadIdx.x >= kCols || threadIdx.x >= count) return;
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = max(largest, magnitudes[i][threadIdx.x]);
  atomicMax(reinterpret_cast<uint32_t*>(amax + threadIdx.x), largest);
}

template <DType kType>
__global__ void __launch_bounds__(kColumnThreads)
    ColumnAmaxKernel(const __grid_constant__ QuantizeColumns args) {
  constexpr int kElements = kPerVector<kType>, kCols = kAmaxCols<kType>;
  constexpr int kWarps = kColumnThreads / kWarp;
  __shared__ __align__(16) uint32_t magnitudes[kWarps][kCols];
  const Place at(blockIdx.x, args.in.rows, args.in.cols, kAmaxRows, kCols);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t col = at.first_col + lane * kElements;

  Extremes<kType> extremes[4];
  if (col < args.in.cols) {
    const uint4* x = static_cast<const uint4*>(args.in.x) +
                     (at.batch * args.in.rows * args.in.cols + col) / kElements;
    for (int row = warp; row < kAmaxRows; row += kInFlight * kWarps) {
      uint4 held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t r = at.first_row + row + i * kWarps;
        held[i] = r < args.in.rows ? __ldg(x + r * args.in.cols / kElements) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        extremes[0].Include(held[i].x);
        extremes[1].Include(held[i].y);
        extremes[2].Include(held[i].z);
        extremes[3].Include(held[i].w);
      }
    }
  }
  const Limits limits = LoadLimits(args.outliers, at.batch);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    constexpr int kPerWord = Word<kType>::kElements;
    magnitudes[warp][lane * kElements + i] =
        extremes[i / kPerWord].template Magnitude<Clip::kClamp>(i % kPerWord, limits);
  }
  __syncthreads();
  AddColumns(magnitudes, args.amax + at.batch * args.in.cols + at.first_col,
             args.in.cols - at.first_col);
}

template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(kColumnThreads, 4)
    TileKernel(const __grid_constant__ QuantizeColumns args) {
  constexpr int kElements = kPerVector<kType>;
  constexpr int kLanes = kTile / kElements;  // that have a row of the tile
  constexpr int kRowsAtOnce = kColumnThreads / kLanes;
  constexpr int kChunkRows = kInFlight * kRowsAtOnce;
  constexpr int kStride = kTile / 4;  // words
  static_assert(kTile % kChunkRows == 0 && kStride % kBanks == 0);
  __shared__ __align__(16) uint32_t tile[kTile * kStride];

  // From the last tile to the first: the end of x is what the pass before has left in L2.
  const Place at(gridDim.x - 1 - blockIdx.x, args.in.rows, args.in.cols, kTile, kTile);
  const int col = threadIdx.x % kLanes * kElements, lane_row = threadIdx.x / kLanes;

  if (col < at.cols) {
    const int64_t origin =
        (at.batch * args.in.rows + at.first_row) * args.in.cols + at.first_col + col;
    const uint4* x = static_cast<const uint4*>(args.in.x) + origin / kElements;
    const int64_t vectors = args.in.cols / kElements;
    uint4 held[kInFlight];
    const auto load = [&](int row) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int r = row + i * kRowsAtOnce;
        held[i] = r < at.rows ? __ldcs(x + r * vectors) : uint4{};
      }
    };
    load(lane_row);

    const int64_t slice = at.batch * args.in.cols + at.first_col + col;
    float scales[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      scales[i] = ScaleOf(__float_as_uint(args.amax[slice + i]), kFormat);
    }
    if (at.first_row == 0 && lane_row == 0) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) args.scale[slice + i] = scales[i];
    }
    Scaling<kElements> scaling;
    scaling.SetEach(scales);
    Limits limits = {};
    if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, at.batch);

#pragma unroll
    for (int chunk = 0; chunk < kTile; chunk += kChunkRows) {
      if (chunk > 0) load(chunk + lane_row);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int row = chunk + lane_row + i * kRowsAtOnce;
        if (row >= at.rows) break;
        float v[kElements];
        Unpack<kType>(held[i], v);
        uint32_t words[kElements / 4];
        Encode<kFormat, kClip>(v, scaling, limits, words);
        if (args.codes != nullptr) StoreBytes(args.codes + origin + row * args.in.cols, words);
        StoreBytes(tile + row * kStride + TileWord<kTile>(row, col / 4), words);
      }
    }
  }
  __syncthreads();
  const int64_t first_t = (at.batch * args.in.cols + at.first_col) * args.in.rows + at.first_row;
  StoreTransposed<kTile>(tile, kStride, at.rows, at.cols, args.in.rows,
                         args.codes_t == nullptr ? nullptr : args.codes_t + first_t,
                         args.packed_t == nullptr ? nullptr : args.packed_t + first_t / 2);
}

// --- a gradient: a scale a row and one a column ---

// Where the largest magnitudes of the rows and of the columns of a matrix are found.
struct GradientAmax {
  uint32_t* rows;
  uint32_t* cols;

  __device__ GradientAmax(const QuantizeGradient& args, int64_t batch) {
    uint32_t* amax = reinterpret_cast<uint32_t*>(args.amax);
    rows = amax + batch * args.in.rows;
    cols = amax + args.in.batch * args.in.rows + batch * args.in.cols;
  }
};

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

// As ColumnAmaxKernel, of both products at once.
template <DType kType>
__global__ void __launch_bounds__(kColumnThreads)
    GradientAmaxKernel(const __grid_constant__ QuantizeGradient args) {
  constexpr int kElements = kPerVector<kType>, kCols = kAmaxCols<kType>;
  constexpr int kWarps = kColumnThreads / kWarp;
  __shared__ uint32_t magnitudes[kWarps][kCols];
  const Place at(blockIdx.x, args.in.rows, args.in.cols, kAmaxRows, kCols);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t col = at.first_col + lane * kElements;
  const bool inside = col < args.in.cols;
  const GradientAmax amax(args, at.batch);

  float col_factor[kElements] = {}, largest[kElements] = {};
  if (inside) LoadFactors(args.col_factor + at.batch * args.in.cols + col, col_factor);
  const uint4* x = static_cast<const uint4*>(args.in.x) +
                   (at.batch * args.in.rows * args.in.cols + col) / kElements;
  for (int row = warp; row < kAmaxRows; row += kInFlight * kWarps) {
    uint4 held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t r = at.first_row + row + i * kWarps;
      held[i] = inside && r < args.in.rows ? __ldg(x + r * args.in.cols / kElements) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t r = at.first_row + row + i * kWarps;
      if (r >= args.in.rows) break;
      const float row_factor = __ldg(args.row_factor + at.batch * args.in.rows + r);
      float v[kElements], of_row = 0;
      Unpack<kType>(held[i], v);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        of_row = MaxOrNaN(of_row, fabsf(__fmul_rn(v[j], col_factor[j])));
        largest[j] = MaxOrNaN(largest[j], fabsf(__fmul_rn(v[j], row_factor)));
      }
      const uint32_t all = WarpMax(__float_as_uint(of_row));
      if (lane == 0) atomicMax(amax.rows + r, all);
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    magnitudes[warp][lane * kElements + i] = inside ? __float_as_uint(largest[i]) : 0;
  }
  __syncthreads();
  AddColumns(magnitudes, reinterpret_cast<float*>(amax.cols) + at.first_col,
             args.in.cols - at.first_col);
}

// As TileKernel, of both products at once.
template <DType kType, Format kFormat>
__global__ void __launch_bounds__(kColumnThreads, 4)
    GradientTileKernel(const __grid_constant__ QuantizeGradient args) {
  constexpr int kElements = kPerVector<kType>;
  constexpr int kLanes = kTile / kElements;  // that have a row of the tile
  constexpr int kRowsAtOnce = kColumnThreads / kLanes;
  constexpr int kChunkRows = kInFlight * kRowsAtOnce;
  constexpr int kStride = kTile / 4;  // words
  __shared__ __align__(16) uint32_t tile[kTile * kStride];
  __shared__ float row_scales[kTile], row_factors[kTile];

  // From the last tile to the first: the end of x is what the pass before has left in L2.
  const Place at(gridDim.x - 1 - blockIdx.x, args.in.rows, args.in.cols, kTile, kTile);
  const int col = threadIdx.x % kLanes * kElements, lane_row = threadIdx.x / kLanes;
  const bool inside = col < at.cols;
  const GradientAmax amax(args, at.batch);

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
  load(lane_row);
  if (threadIdx.x < at.rows) {
    const int64_t row = at.first_row + threadIdx.x, slice = at.batch * args.in.rows + row;
    row_scales[threadIdx.x] = ScaleOf(amax.rows[row], kFormat);
    row_factors[threadIdx.x] = args.row_factor[slice];
    if (at.first_col == 0) args.row_scale[slice] = row_scales[threadIdx.x];
  }
  Scaling<kElements> by_col;
  float col_factor[kElements];
  if (inside) {
    float scales[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      scales[i] = ScaleOf(amax.cols[at.first_col + col + i], kFormat);
    const int64_t slice = at.batch * args.in.cols + at.first_col + col;
    if (at.first_row == 0 && lane_row == 0) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) args.col_scale[slice + i] = scales[i];
    }
    by_col.SetEach(scales);
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
      by_row.Set(row_scales[row]);
#pragma unroll
      for (int j = 0; j < kElements; ++j) product[j] = __fmul_rn(v[j], col_factor[j]);
      Encode<kFormat, Clip::kNone>(product, by_row, Limits{}, words);
      StoreBytes(args.codes + origin + row * args.in.cols, words);
#pragma unroll
      for (int j = 0; j < kElements; ++j) product[j] = __fmul_rn(v[j], row_factors[row]);
      Encode<kFormat, Clip::kNone>(product, by_col, Limits{}, words);
      StoreBytes(tile + row * kStride + TileWord<kTile>(row, col / 4), words);
    }
  }
  __syncthreads();
  StoreTransposed<kTile>(
      tile, kStride, at.rows, at.cols, args.in.rows,
      args.codes_t + (at.batch * args.in.cols + at.first_col) * args.in.rows + at.first_row,
      nullptr);
}

// --- anything else ---

// Scales along one axis: the row's if row_scale is set, else the column's, from col_amax.
struct Any {
  QuantizeInput in;
  Outliers outliers;
  Format format;
  const float* row_factor;
  const float* col_factor;
  float* row_scale;
  float* col_scale;
  float* col_amax;
  const float* amax_floor;
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed;
  uint8_t* packed_t;
};

constexpr int kAnyTile = 32;
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
  if (outliers.compensate) {
    return ToBytes<Carrier(kFormat, Clip::kCompensate)>(
        Code<kFormat, Clip::kCompensate>(x, inverse, limits), 0, 0, 0);
  }
  return ToBytes<Carrier(kFormat, Clip::kClamp)>(Code<kFormat, Clip::kClamp>(x, inverse, limits), 0,
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
  uint32_t amax = 0;
  for (int64_t col = threadIdx.x; col < args.in.cols; col += kAnyThreads) {
    amax = max(amax, ClippedMagnitude(AnyElement(args, batch, row, col), limits));
  }
  amax = WarpMax(amax);
  if (threadIdx.x % kWarp == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const uint32_t other : warp_amax) amax = max(amax, other);
    if (args.amax_floor != nullptr) {
      amax = max(amax, __float_as_uint(args.amax_floor[blockIdx.x]));
    }
    args.row_scale[blockIdx.x] = ScaleOf(amax, args.format);
  }
}

// A thread a column, over a chunk of the rows.
__global__ void __launch_bounds__(kAnyThreads)
    AnyColumnAmaxKernel(const __grid_constant__ Any args) {
  const uint32_t col_blocks = TileCount(args.in.cols, kAnyThreads);
  const uint32_t chunks = TileCount(args.in.rows, kAmaxRows);
  const int64_t col = int64_t{blockIdx.x % col_blocks} * kAnyThreads + threadIdx.x;
  const int64_t first_row = int64_t{blockIdx.x / col_blocks % chunks} * kAmaxRows;
  const int64_t batch = blockIdx.x / (col_blocks * chunks);
  if (col >= args.in.cols) return;
  const Limits limits = LoadLimits(args.outliers, batch);
  uint32_t amax = 0;
  for (int64_t row = first_row; row < min(first_row + kAmaxRows, args.in.rows); ++row) {
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
    col_scale = ScaleOf(__float_as_uint(args.col_amax[slice]), args.format);
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

// --- launching ---

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                   const Args&... args) {
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <Format kFormat>
using FormatConstant = std::integral_constant<Format, kFormat>;
template <DType kType>
using TypeConstant = std::integral_constant<DType, kType>;
template <Clip kClip>
using ClipConstant = std::integral_constant<Clip, kClip>;

// Calls f with the run-time value as a constant.
template <typename F>
cudaError_t WithType(DType type, F&& f) {
  switch (type) {
    case DType::kBF16:
      return f(TypeConstant<DType::kBF16>());
    case DType::kF16:
      return f(TypeConstant<DType::kF16>());
    case DType::kF32:
      return f(TypeConstant<DType::kF32>());
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t WithFormat(Format format, F&& f) {
  switch (format) {
    case Format::kE2M1:
      return f(FormatConstant<Format::kE2M1>());
    case Format::kE1M2:
      return f(FormatConstant<Format::kE1M2>());
    case Format::kE3M0:
      return f(FormatConstant<Format::kE3M0>());
    case Format::kE4M3:
      return f(FormatConstant<Format::kE4M3>());
    case Format::kE5M2:
      return f(FormatConstant<Format::kE5M2>());
  }
  return cudaErrorInvalidValue;
}

Clip ClipOf(const Outliers& outliers) {
  if (outliers.compensate) return Clip::kCompensate;
  return outliers.lo == nullptr && outliers.hi == nullptr ? Clip::kNone : Clip::kClamp;
}

// Eight-bit formats clip nothing in the kernels that are compiled for them: see HasFastKernel.
template <typename F>
cudaError_t WithAll(DType type, Format format, const Outliers& outliers, F&& f) {
  return WithType(type, [&](auto t) {
    return WithFormat(format, [&](auto q) {
      if constexpr (IsFourBit(q())) {
        if (outliers.compensate) return f(t, q, ClipConstant<Clip::kCompensate>());
        if (ClipOf(outliers) == Clip::kClamp) return f(t, q, ClipConstant<Clip::kClamp>());
      }
      return f(t, q, ClipConstant<Clip::kNone>());
    });
  });
}

bool HasFastKernel(Format format, const Outliers& outliers) {
  return IsFourBit(format) || ClipOf(outliers) == Clip::kNone;
}

bool IsAligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Whether rows of the input are whole vectors, and those of its codes whole words to match.
bool HasVectors(const QuantizeInput& in, const void* codes, const void* packed) {
  const int elements = kVectorBytes / ElementBytes(in.type);
  return in.rows > 0 && in.cols > 0 && in.cols % elements == 0 && IsAligned(in.x, kVectorBytes) &&
         IsAligned(codes, elements) && IsAligned(packed, elements / 2);
}

// Whether columns of the codes are whole groups, to be stored 16 bytes at a time.
bool HasGroups(const QuantizeInput& in, const void* codes_t, const void* packed_t) {
  return in.rows % kGroupRows == 0 && IsAligned(codes_t, kGroupRows) &&
         IsAligned(packed_t, kGroupRows / 2);
}

// What kernels raise to the largest magnitudes.
cudaError_t StartAmax(float* amax, const float* floor, int64_t size, cudaStream_t stream) {
  const size_t bytes = size * sizeof(float);
  return floor == nullptr ? cudaMemsetAsync(amax, 0, bytes, stream)
                          : cudaMemcpyAsync(amax, floor, bytes, cudaMemcpyDeviceToDevice, stream);
}

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
    error = StartAmax(args.col_amax, args.amax_floor, in.batch * in.cols, stream);
    if (error == cudaSuccess && in.rows > 0) {
      const int64_t blocks = in.batch * CeilDiv(in.rows, kAmaxRows) * CeilDiv(in.cols, kAnyThreads);
      error = Launch(AnyColumnAmaxKernel, blocks, kAnyThreads, stream, args);
    }
    if (error != cudaSuccess) return error;
    row_tiles = std::max<int64_t>(row_tiles, 1);  // a column without rows has a scale, too
  }
  return Launch(AnyTileKernel, in.batch * row_tiles * CeilDiv(in.cols, kAnyTile), kAnyThreads,
                stream, args);
}

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
  const int64_t blocks = in.batch * CeilDiv(in.rows, kTile) * CeilDiv(in.cols, kTile);
  return Launch(TransposeKernel, blocks, kTransposeThreads, stream, codes, in.rows, in.cols,
                codes_t);
}

template <DType kType>
int64_t AmaxBlocks(const QuantizeInput& in) {
  return in.batch * CeilDiv(in.rows, kAmaxRows) * CeilDiv(in.cols, kAmaxCols<kType>);
}

int64_t TileBlocks(const QuantizeInput& in) {
  return in.batch * CeilDiv(in.rows, kTile) * CeilDiv(in.cols, kTile);
}

cudaError_t LaunchTiles(const QuantizeColumns& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  cudaError_t error = StartAmax(args.amax, args.amax_floor, in.batch * in.cols, stream);
  if (error != cudaSuccess) return error;
  error = WithType(in.type, [&](auto type) {
    return Launch(ColumnAmaxKernel<type()>, AmaxBlocks<type()>(in), kColumnThreads, stream, args);
  });
  if (error != cudaSuccess) return error;
  return WithAll(in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
    return Launch(TileKernel<type(), format(), clip()>, TileBlocks(in), kColumnThreads, stream,
                  args);
  });
}

cudaError_t LaunchGradientTiles(const QuantizeGradient& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  const int64_t rows = in.batch * in.rows, cols = in.batch * in.cols;
  cudaError_t error;
  if (args.row_floor == nullptr && args.col_floor == nullptr) {
    error = StartAmax(args.amax, nullptr, rows + cols, stream);
  } else {
    error = StartAmax(args.amax, args.row_floor, rows, stream);
    if (error == cudaSuccess) error = StartAmax(args.amax + rows, args.col_floor, cols, stream);
  }
  if (error != cudaSuccess) return error;
  error = WithType(in.type, [&](auto type) {
    return Launch(GradientAmaxKernel<type()>, AmaxBlocks<type()>(in), kColumnThreads, stream, args);
  });
  if (error != cudaSuccess) return error;
  return WithType(in.type, [&](auto type) {
    return WithFormat(args.format, [&](auto format) {
      return Launch(GradientTileKernel<type(), format()>, TileBlocks(in), kColumnThreads, stream,
                    args);
    });
  });
}

}  // namespace

cudaError_t LaunchQuantizeRows(const QuantizeRows& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasFastKernel(args.format, args.outliers) && HasVectors(in, args.codes, args.packed)) {
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

cudaError_t LaunchQuantizeColumns(const QuantizeColumns& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (!HasFastKernel(args.format, args.outliers) || !HasVectors(in, args.codes, nullptr) ||
      !HasGroups(in, args.codes_t, args.packed_t)) {
    Any any = {in, args.outliers, args.format};
    any.col_scale = args.scale;
    any.col_amax = args.amax;
    any.amax_floor = args.amax_floor;
    any.codes = args.codes;
    any.codes_t = args.codes_t;
    any.packed_t = args.packed_t;
    return LaunchAny(any, stream);
  }
  return LaunchTiles(args, stream);
}

cudaError_t LaunchQuantizeGradient(const QuantizeGradient& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasVectors(in, args.codes, nullptr) && HasGroups(in, args.codes_t, nullptr) &&
      IsAligned(args.col_factor, sizeof(float4))) {
    return LaunchGradientTiles(args, stream);
  }
  Any rows = {in, {}, args.format};
  rows.col_factor = args.col_factor;
  rows.row_scale = args.row_scale;
  rows.amax_floor = args.row_floor;
  rows.codes = args.codes;
  Any columns = {in, {}, args.format};
  columns.row_factor = args.row_factor;
  columns.col_scale = args.col_scale;
  columns.col_amax = args.amax + in.batch * in.rows;
  columns.amax_floor = args.col_floor;
  columns.codes_t = args.codes_t;
  const cudaError_t error = LaunchAny(rows, stream);
  return error == cudaSuccess ? LaunchAny(columns, stream) : error;
}

}  // namespace jfp4
