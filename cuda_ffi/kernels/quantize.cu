// Quantisation is bound by memory: each kernel reads its input as few times as its reduction allows
// and writes every layout in whole 32-byte sectors.
//
//   RowsKernel          one layout, a scale a row: the row waits in registers for its scale.
//   BothLayoutsKernel   both layouts, a scale a row: 32 rows wait in the shared memory of a cluster.
//   ColumnAmaxKernel,   a scale a column: one pass for the largest magnitudes, a second one for the
//   TileKernel            codes, transposed in tiles.
//   GradientKernel      a scale a row and, from the same read, the largest magnitudes by column for
//                         a TileKernel to follow.
//   Any...Kernel        the same for any shape, alignment, type and format, chosen at run time.
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

// Elements of one row that a thread of RowsKernel or GradientKernel holds.
constexpr int kHeld = 32;
template <DType kType>
constexpr int kVectorsHeld = kHeld / kPerVector<kType>;

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
    words[i] = scaling.keep[i] &
               ToBytes<Carrier(kFormat, kClip)>(code[0], code[1], code[2], code[3]);
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

// --- a scale a row, one layout ---

// A block a row.
template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(kMaxThreads)
    RowsKernel(const __grid_constant__ QuantizeRows args) {
  constexpr int kElements = kPerVector<kType>, kVectors = kVectorsHeld<kType>;
  __shared__ uint32_t warp_amax[kMaxThreads / kWarp];
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(args.in.cols / kElements);
  const uint4* x = static_cast<const uint4*>(args.in.x) + row * vectors;

  uint4 held[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    held[i] = vector < vectors ? __ldcs(x + vector) : uint4{};
  }
  Limits limits = {};
  if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, row / args.in.rows);
  Extremes<kType> extremes;
#pragma unroll
  for (const uint4& vector : held) Include(extremes, vector);
  uint32_t amax = WarpMax(extremes.template Magnitude<kClip>(limits));
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) warp_amax[threadIdx.x / kWarp] = amax;
  __syncthreads();
  amax = WarpMax(lane < blockDim.x / kWarp ? warp_amax[lane] : 0);

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

// --- a scale a row, both layouts ---

constexpr int kClusterRows = 32;  // a sector of each column of codes_t
constexpr int kMaxCluster = 8;
constexpr int kMinBlockCols = 256;
constexpr int kBlockColsUnit = 64;  // with two bytes an element, whole rounds of the banks

__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t ClusterSize() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ __forceinline__ void StoreRemote(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Copies whole vectors to shared memory and counts their bytes on `barrier`.
__device__ __forceinline__ void BulkLoad(void* to, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// A cluster has 32 rows of a matrix, each block of it `block_cols` columns of them. A warp has whole
// rows of its block: it leaves the codes of a row in front of the part of the row that it has yet
// to read, where the block then finds them to transpose.
template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(512, 2)
    BothLayoutsKernel(const __grid_constant__ QuantizeRows args, int block_cols) {
  constexpr int kElements = kPerVector<kType>;
  extern __shared__ __align__(128) uint8_t tile[];
  __shared__ uint32_t amax[kMaxCluster][kClusterRows];
  __shared__ uint64_t loaded;

  const int rank = ClusterRank(), cluster_size = ClusterSize();
  const int64_t row_tiles = (args.in.rows + kClusterRows - 1) / kClusterRows;
  const int64_t cluster = blockIdx.x / cluster_size, batch = cluster / row_tiles;
  const int64_t row_in_matrix = cluster % row_tiles * kClusterRows;
  const int64_t first_row = batch * args.in.rows + row_in_matrix;  // counted over all matrices
  const int64_t first_col = static_cast<int64_t>(rank) * block_cols;
  const int rows = static_cast<int>(min(args.in.rows - row_in_matrix, int64_t{kClusterRows}));
  const int cols = static_cast<int>(max(min(args.in.cols - first_col, int64_t{block_cols}),
                                        int64_t{0}));
  const int stride = block_cols * ElementBytes(kType);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;

  if (threadIdx.x == 0) {
    BarrierInit(&loaded, 1);
    FenceBarrierInit();
    BarrierExpect(&loaded, rows * cols * ElementBytes(kType));
  }
  if (warp == 0) {
    __syncwarp();
    static_assert(kClusterRows == kWarp, "a lane copies a row");
    if (lane < rows && cols > 0) {
      const uint8_t* from = static_cast<const uint8_t*>(args.in.x) +
                            ((first_row + lane) * args.in.cols + first_col) * ElementBytes(kType);
      BulkLoad(tile + lane * stride, from, cols * ElementBytes(kType), &loaded);
    }
  }
  __syncthreads();  // the barrier is initialised
  ClusterArrive();
  Limits limits = {};
  if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, batch);
  BarrierWait(&loaded, 0);
  ClusterWait();  // every block runs, so that its shared memory may be written

  const int vectors = cols / kElements;
  for (int row = warp; row < rows; row += warps) {
    const uint4* x = reinterpret_cast<const uint4*>(tile + row * stride);
    Extremes<kType> extremes;
    for (int vector = lane; vector < vectors; vector += kWarp) Include(extremes, x[vector]);
    const uint32_t magnitude = WarpMax(extremes.template Magnitude<kClip>(limits));
    if (lane < cluster_size) StoreRemote(MapToRank(SharedAddress(&amax[rank][row]), lane), magnitude);
  }
  ClusterSync();

  for (int row = warp; row < rows; row += warps) {
    const float scale = ScaleOf(WarpMax(lane < cluster_size ? amax[lane][row] : 0), kFormat);
    if (rank == 0 && lane == 0) args.scale[first_row + row] = scale;
    Scaling<kElements> scaling;
    scaling.Set(scale);
    const uint4* x = reinterpret_cast<const uint4*>(tile + row * stride);
    uint32_t* codes = reinterpret_cast<uint32_t*>(tile + row * stride);
    const int64_t at_row = (first_row + row) * args.in.cols + first_col;
    for (int base = 0; base < vectors; base += kWarp) {
      const int vector = base + lane;
      const uint4 loaded_vector = vector < vectors ? x[vector] : uint4{};
      __syncwarp();  // the codes overwrite what other lanes have just read
      if (vector >= vectors) break;
      float v[kElements];
      Unpack<kType>(loaded_vector, v);
      uint32_t words[kElements / 4];
      Encode<kFormat, kClip>(v, scaling, limits, words);
      const int64_t at = at_row + vector * kElements;
      if (args.codes != nullptr) StoreBytes(args.codes + at, words);
      if (args.packed != nullptr) StoreNibbles(args.packed + at / 2, words);
      StoreBytes(codes + TileWord<kClusterRows>(row, vector * (kElements / 4)), words);
    }
  }
  __syncthreads();
  StoreTransposed<kClusterRows>(
      reinterpret_cast<const uint32_t*>(tile), stride / 4, rows, cols, args.in.rows,
      args.codes_t + (batch * args.in.cols + first_col) * args.in.rows + row_in_matrix, nullptr);
}

// --- a scale a column ---

constexpr int kColumnThreads = 256;
constexpr int kInFlight = 8;  // loads of a thread

// Lanes have the vectors of a row, warps the rows of a chunk in turn. Adds to args.amax, whose
// values are compared as integers.
constexpr int kAmaxRows = 128;
static_assert(kAmaxRows % (kInFlight * kColumnThreads / kWarp) == 0);

template <DType kType>
constexpr int kAmaxCols = kWarp * kPerVector<kType>;

template <DType kType>
__global__ void __launch_bounds__(kColumnThreads)
    ColumnAmaxKernel(const __grid_constant__ QuantizeColumns args) {
  constexpr int kElements = kPerVector<kType>, kCols = kAmaxCols<kType>;
  constexpr int kWarps = kColumnThreads / kWarp;
  __shared__ __align__(16) uint32_t magnitudes[kWarps][kCols];
  const int64_t col_blocks = (args.in.cols + kCols - 1) / kCols;
  const int64_t chunks = (args.in.rows + kAmaxRows - 1) / kAmaxRows;
  const int64_t first_col = blockIdx.x % col_blocks * kCols;
  const int64_t first_row = blockIdx.x / col_blocks % chunks * kAmaxRows;
  const int64_t batch = blockIdx.x / (col_blocks * chunks);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t col = first_col + lane * kElements;

  Extremes<kType> extremes[4];
  if (col < args.in.cols) {
    const uint4* x = static_cast<const uint4*>(args.in.x) +
                     (batch * args.in.rows * args.in.cols + col) / kElements;
    for (int row = warp; row < kAmaxRows; row += kInFlight * kWarps) {
      uint4 held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t r = first_row + row + i * kWarps;
        held[i] = r < args.in.rows ? __ldg(x + r * args.in.cols / kElements) : uint4{};
      }
#pragma unroll
      for (const uint4& vector : held) {
        extremes[0].Include(vector.x);
        extremes[1].Include(vector.y);
        extremes[2].Include(vector.z);
        extremes[3].Include(vector.w);
      }
    }
  }
  const Limits limits = LoadLimits(args.outliers, batch);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    constexpr int kPerWord = Word<kType>::kElements;
    magnitudes[warp][lane * kElements + i] =
        extremes[i / kPerWord].template Magnitude<Clip::kClamp>(i % kPerWord, limits);
  }
  __syncthreads();
  if (threadIdx.x < kCols && first_col + threadIdx.x < args.in.cols) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) largest = max(largest, magnitudes[i][threadIdx.x]);
    float* amax = args.amax + batch * args.in.cols + first_col + threadIdx.x;
    atomicMax(reinterpret_cast<uint32_t*>(amax), largest);
  }
}

// The columns' codes of x * row_factor, of which `columns.amax` has the largest magnitudes.
struct Tiles {
  QuantizeColumns columns;
  const float* row_factor;  // null is one
};

constexpr int kTile = 128;

template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(kColumnThreads, 3)
    TileKernel(const __grid_constant__ Tiles tiles) {
  const QuantizeColumns& args = tiles.columns;
  constexpr int kElements = kPerVector<kType>;
  constexpr int kLanes = kTile / kElements;               // that have a row of the tile
  constexpr int kRowsAtOnce = kColumnThreads / kLanes;
  constexpr int kChunkRows = kInFlight * kRowsAtOnce;
  constexpr int kStride = kTile / 4;  // words
  static_assert(kTile % kChunkRows == 0 && kStride % kBanks == 0);
  __shared__ __align__(16) uint32_t tile[kTile * kStride];

  // From the last tile to the first: the end of x is what the pass before has left in L2.
  const int64_t index = gridDim.x - 1 - blockIdx.x;
  const int64_t col_tiles = (args.in.cols + kTile - 1) / kTile;
  const int64_t row_tiles = (args.in.rows + kTile - 1) / kTile;
  const int64_t first_col = index % col_tiles * kTile;
  const int64_t first_row = index / col_tiles % row_tiles * kTile;
  const int64_t batch = index / (col_tiles * row_tiles);
  const int rows = static_cast<int>(min(args.in.rows - first_row, int64_t{kTile}));
  const int cols = static_cast<int>(min(args.in.cols - first_col, int64_t{kTile}));
  const int col = threadIdx.x % kLanes * kElements, lane_row = threadIdx.x / kLanes;

  if (col < cols) {
    const int64_t origin = (batch * args.in.rows + first_row) * args.in.cols + first_col + col;
    const uint4* x = static_cast<const uint4*>(args.in.x) + origin / kElements;
    uint4 held[kInFlight];
    const auto load = [&](int row) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int r = row + i * kRowsAtOnce;
        held[i] = r < rows ? __ldcs(x + r * args.in.cols / kElements) : uint4{};
      }
    };
    load(lane_row);

    const int64_t slice = batch * args.in.cols + first_col + col;
    float scales[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      scales[i] = ScaleOf(__float_as_uint(args.amax[slice + i]), kFormat);
    }
    if (first_row == 0 && lane_row == 0) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) args.scale[slice + i] = scales[i];
    }
    Scaling<kElements> scaling;
    scaling.SetEach(scales);
    Limits limits = {};
    if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, batch);

#pragma unroll
    for (int chunk = 0; chunk < kTile; chunk += kChunkRows) {
      if (chunk > 0) load(chunk + lane_row);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int row = chunk + lane_row + i * kRowsAtOnce;
        if (row >= rows) break;
        float v[kElements];
        Unpack<kType>(held[i], v);
        if (tiles.row_factor != nullptr) {
          const float factor = tiles.row_factor[batch * args.in.rows + first_row + row];
#pragma unroll
          for (float& value : v) value = __fmul_rn(value, factor);
        }
        uint32_t words[kElements / 4];
        Encode<kFormat, kClip>(v, scaling, limits, words);
        if (args.codes != nullptr) StoreBytes(args.codes + origin + row * args.in.cols, words);
        StoreBytes(tile + row * kStride + TileWord<kTile>(row, col / 4), words);
      }
    }
  }
  __syncthreads();
  const int64_t at = (batch * args.in.cols + first_col) * args.in.rows + first_row;
  StoreTransposed<kTile>(tile, kStride, rows, cols, args.in.rows,
                         args.codes_t == nullptr ? nullptr : args.codes_t + at,
                         args.packed_t == nullptr ? nullptr : args.packed_t + at / 2);
}

// --- gradients ---

constexpr int kGradientThreads = 512;

// Each block has every `blocks`-th row of a matrix, and each thread the same columns of all of them:
// it holds their factors and largest magnitudes, and has the next row in flight.
template <DType kType, Format kFormat>
__global__ void __launch_bounds__(kGradientThreads, 1)
    GradientKernel(const __grid_constant__ QuantizeGradient args, int blocks) {
  constexpr int kElements = kPerVector<kType>, kVectors = kVectorsHeld<kType>;
  extern __shared__ float4 col_factors[];  // [kElements / 4][vectors], no two lanes in a bank
  __shared__ uint32_t warp_amax[2][kGradientThreads / kWarp];
  const int64_t batch = blockIdx.x / blocks;
  const int vectors = static_cast<int>(args.in.cols / kElements);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  // A thread reads the factors that it has written, and no others.
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
#pragma unroll
    for (int j = 0; j < kElements / 4; ++j) {
      float4 factor = make_float4(1, 1, 1, 1);
      if (args.col_factor != nullptr) {
        const float* from = args.col_factor + batch * args.in.cols + vector * kElements + 4 * j;
        factor = make_float4(from[0], from[1], from[2], from[3]);
      }
      col_factors[j * vectors + vector] = factor;
    }
  }

  uint4 next[kVectors];
  const auto load = [&](int64_t row) {
    const uint4* x = static_cast<const uint4*>(args.in.x) + (batch * args.in.rows + row) * vectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = threadIdx.x + i * blockDim.x;
      next[i] = vector < vectors ? __ldg(x + vector) : uint4{};
    }
  };
  float col_amax[kVectors][kElements] = {};
  int parity = 0;
  int64_t row = blockIdx.x % blocks;
  if (row < args.in.rows) load(row);
  for (; row < args.in.rows; row += blocks, parity ^= 1) {
    const int64_t slice = batch * args.in.rows + row;
    const float row_factor = args.row_factor == nullptr ? 1.0f : args.row_factor[slice];
    float v[kVectors][kElements];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) Unpack<kType>(next[i], v[i]);
    if (row + blocks < args.in.rows) load(row + blocks);

    float row_amax = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = threadIdx.x + i * blockDim.x;
      if (vector >= vectors) break;
#pragma unroll
      for (int j = 0; j < kElements; j += 4) {
        const float4 factor = col_factors[j / 4 * vectors + vector];
        const float factors[4] = {factor.x, factor.y, factor.z, factor.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float& value = v[i][j + k];
          float& largest = col_amax[i][j + k];
          largest = MaxOrNaN(largest, fabsf(__fmul_rn(value, row_factor)));
          value = __fmul_rn(value, factors[k]);
          row_amax = MaxOrNaN(row_amax, fabsf(value));
        }
      }
    }
    if (args.codes == nullptr) continue;

    // By turns in two places, so that one barrier a row will do.
    const uint32_t magnitude = WarpMax(__float_as_uint(row_amax));
    if (lane == 0) warp_amax[parity][warp] = magnitude;
    __syncthreads();
    const float scale = ScaleOf(
        WarpMax(lane < blockDim.x / kWarp ? warp_amax[parity][lane] : 0), kFormat);
    if (threadIdx.x == 0) args.row_scale[slice] = scale;
    Scaling<kElements> scaling;
    scaling.Set(scale);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = threadIdx.x + i * blockDim.x;
      if (vector >= vectors) break;
      uint32_t words[kElements / 4];
      Encode<kFormat, Clip::kNone>(v[i], scaling, Limits{}, words);
      StoreBytes(args.codes + (slice * vectors + vector) * kElements, words);
    }
  }
  if (args.codes_t == nullptr) return;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * blockDim.x;
    if (vector >= vectors) break;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      float* amax = args.amax + batch * args.in.cols + vector * kElements + j;
      atomicMax(reinterpret_cast<uint32_t*>(amax), __float_as_uint(col_amax[i][j]));
    }
  }
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
__global__ void __launch_bounds__(kAnyThreads)
    AnyRowScaleKernel(const __grid_constant__ Any args) {
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
    args.row_scale[blockIdx.x] = ScaleOf(amax, args.format);
  }
}

// A thread a column, over a chunk of the rows.
__global__ void __launch_bounds__(kAnyThreads)
    AnyColumnAmaxKernel(const __grid_constant__ Any args) {
  const int64_t col_blocks = (args.in.cols + kAnyThreads - 1) / kAnyThreads;
  const int64_t chunks = (args.in.rows + kAmaxRows - 1) / kAmaxRows;
  const int64_t col = blockIdx.x % col_blocks * kAnyThreads + threadIdx.x;
  const int64_t first_row = blockIdx.x / col_blocks % chunks * kAmaxRows;
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
  const int64_t col_tiles = (cols + kAnyTile - 1) / kAnyTile;
  const int64_t row_tiles = max((rows + kAnyTile - 1) / kAnyTile, int64_t{1});
  const int64_t first_col = blockIdx.x % col_tiles * kAnyTile;
  const int64_t first_row = blockIdx.x / col_tiles % row_tiles * kAnyTile;
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

// Shared memory above the 48 KB that every kernel may have.
template <typename Kernel>
cudaError_t AllowShared(Kernel* kernel, int bytes) {
  constexpr int kDefaultBytes = 48 * 1024;
  if (bytes <= kDefaultBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                   int cluster_size, cudaStream_t stream, const Args&... args) {
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const cudaError_t error = AllowShared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_size > 1 ? 1 : 0;
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

cudaError_t ClearAmax(float* amax, const QuantizeInput& in, cudaStream_t stream) {
  return cudaMemsetAsync(amax, 0, in.batch * in.cols * sizeof(float), stream);
}

cudaError_t LaunchAny(const Any& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  cudaError_t error = cudaSuccess;
  int64_t row_tiles = CeilDiv(in.rows, kAnyTile);
  if (args.row_scale != nullptr) {
    if (in.batch * in.rows == 0) return cudaSuccess;
    error = Launch(AnyRowScaleKernel, in.batch * in.rows, kAnyThreads, 0, 1, stream, args);
    if (error != cudaSuccess || in.cols == 0) return error;
  } else {
    if (in.batch * in.cols == 0) return cudaSuccess;
    error = ClearAmax(args.col_amax, in, stream);
    if (error == cudaSuccess && in.rows > 0) {
      const int64_t blocks =
          in.batch * CeilDiv(in.rows, kAmaxRows) * CeilDiv(in.cols, kAnyThreads);
      error = Launch(AnyColumnAmaxKernel, blocks, kAnyThreads, 0, 1, stream, args);
    }
    if (error != cudaSuccess) return error;
    row_tiles = std::max<int64_t>(row_tiles, 1);  // a column without rows has a scale, too
  }
  return Launch(AnyTileKernel, in.batch * row_tiles * CeilDiv(in.cols, kAnyTile), kAnyThreads, 0, 1,
                stream, args);
}

// Shared memory of a block of BothLayoutsKernel, and what two of them leave each other on an SM.
constexpr int kStaticSharedBytes = kMaxCluster * kClusterRows * 4 + 16;
constexpr int kMaxTileBytes = 227 * 1024 - kStaticSharedBytes;
constexpr int kSmallTileBytes = 56 * 1024;  // four or more blocks an SM

cudaError_t LaunchBothLayouts(const QuantizeRows& args, int cluster_size, int block_cols,
                              cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  const int tile_bytes = kClusterRows * block_cols * ElementBytes(in.type);
  const int threads = tile_bytes <= kSmallTileBytes ? 256 : 512;
  const int64_t blocks = in.batch * CeilDiv(in.rows, kClusterRows) * cluster_size;
  return WithAll(in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
    return Launch(BothLayoutsKernel<type(), format(), clip()>, blocks, threads, tile_bytes,
                  cluster_size, stream, args, block_cols);
  });
}

cudaError_t LaunchTiles(const Tiles& tiles, cudaStream_t stream) {
  const QuantizeColumns& args = tiles.columns;
  const QuantizeInput& in = args.in;
  const int64_t blocks = in.batch * CeilDiv(in.rows, kTile) * CeilDiv(in.cols, kTile);
  return WithAll(in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
    return Launch(TileKernel<type(), format(), clip()>, blocks, kColumnThreads, 0, 1, stream,
                  tiles);
  });
}

// As many blocks as run at once, spread over the matrices.
template <DType kType, Format kFormat>
cudaError_t LaunchGradient(const QuantizeGradient& args, cudaStream_t stream) {
  const auto kernel = GradientKernel<kType, kFormat>;
  const QuantizeInput& in = args.in;
  const int threads = RoundUp(CeilDiv(in.cols, kHeld), kWarp);
  const int shared_bytes = in.cols * sizeof(float);
  int device, processors, resident;
  cudaError_t error = AllowShared(kernel, shared_bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t share = std::max<int64_t>(processors * resident / in.batch, 1);
  const int blocks = static_cast<int>(std::min(share, in.rows));  // of a matrix
  return Launch(kernel, in.batch * blocks, threads, shared_bytes, 1, stream, args, blocks);
}

}  // namespace

cudaError_t LaunchQuantizeRows(const QuantizeRows& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasFastKernel(args.format, args.outliers) && HasVectors(in, args.codes, args.packed)) {
    if (args.codes_t == nullptr && in.cols <= kMaxThreads * kHeld) {
      const int threads = RoundUp(CeilDiv(in.cols, kHeld), kWarp);
      return WithAll(in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
        return Launch(RowsKernel<type(), format(), clip()>, in.batch * in.rows, threads, 0, 1,
                      stream, args);
      });
    }
    const int cluster_size = std::min<int64_t>(CeilDiv(in.cols, kMinBlockCols), kMaxCluster);
    const int64_t block_cols = RoundUp(CeilDiv(in.cols, cluster_size), kBlockColsUnit);
    if (args.codes_t != nullptr && HasGroups(in, args.codes_t, nullptr) &&
        kClusterRows * block_cols * ElementBytes(in.type) <= kMaxTileBytes) {
      return LaunchBothLayouts(args, cluster_size, block_cols, stream);
    }
  }
  Any any = {in, args.outliers, args.format};
  any.row_scale = args.scale;
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
    any.codes = args.codes;
    any.codes_t = args.codes_t;
    any.packed_t = args.packed_t;
    return LaunchAny(any, stream);
  }
  cudaError_t error = ClearAmax(args.amax, in, stream);
  if (error != cudaSuccess) return error;
  error = WithType(in.type, [&](auto type) {
    const int64_t blocks =
        in.batch * CeilDiv(in.rows, kAmaxRows) * CeilDiv(in.cols, kAmaxCols<type()>);
    return Launch(ColumnAmaxKernel<type()>, blocks, kColumnThreads, 0, 1, stream, args);
  });
  if (error != cudaSuccess) return error;
  return LaunchTiles({args, nullptr}, stream);
}

cudaError_t LaunchQuantizeGradient(const QuantizeGradient& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasVectors(in, args.codes, nullptr) && HasGroups(in, args.codes_t, nullptr) &&
      in.cols <= kGradientThreads * kHeld) {
    cudaError_t error = cudaSuccess;
    if (args.codes_t != nullptr) error = ClearAmax(args.amax, in, stream);
    if (error != cudaSuccess) return error;
    error = WithType(in.type, [&](auto type) {
      return WithFormat(args.format, [&](auto format) {
        return LaunchGradient<type(), format()>(args, stream);
      });
    });
    if (error != cudaSuccess || args.codes_t == nullptr) return error;
    QuantizeColumns columns = {in, {}, args.format};
    columns.codes_t = args.codes_t;
    columns.scale = args.col_scale;
    columns.amax = args.amax;
    return LaunchTiles({columns, args.row_factor}, stream);
  }
  Any rows = {in, {}, args.format};
  rows.col_factor = args.col_factor;
  rows.row_scale = args.row_scale;
  rows.codes = args.codes;
  Any columns = {in, {}, args.format};
  columns.row_factor = args.row_factor;
  columns.col_scale = args.col_scale;
  columns.col_amax = args.amax;
  columns.codes_t = args.codes_t;
  cudaError_t error = cudaSuccess;
  if (args.row_scale != nullptr) error = LaunchAny(rows, stream);
  if (error == cudaSuccess && args.col_scale != nullptr) error = LaunchAny(columns, stream);
  return error;
}

}  // namespace jfp4
