// One persistent block an SM, in clusters of two. A cluster computes 256 rows of y by one tile's
// columns: each block 128 of the rows, both the same columns, so that each loads half of b's tile
// and sends it to both. One warp feeds a ring of shared-memory stages through the copy engine. Two
// warpgroups multiply, by turns, a tile each: while one writes its tile, through shared memory, the
// other has the tensor cores to itself. Promotion needs a second set of accumulators, so there they
// share a tile.
//
// What bounds the rate, beside power, is what L2 delivers: so tiles are wide, the clusters at work
// read few columns of b and the same rows of a at about the same time, and each takes its next tile
// when it has room for one, since those that are nearer to L2 are faster.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/gemm.h"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/wgmma.cuh"

namespace jfp4 {
namespace {

constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kBlockM = 128;
constexpr int kBlockK = 128;  // bytes, one swizzle row
constexpr int kWgmmaM = 64;
constexpr int kWgmmaK = 32;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);

// A tile's columns. The more they are, the less is read for each product; but the more is computed
// past the end, too, where tiles are few, and the fewer registers are left to the epilogue. The
// widest have two warpgroups share a tile, so that its epilogue is not hidden.
constexpr int kNarrow = 128;
constexpr int kMedium = 160;
constexpr int kWide = 192;
constexpr int kJoint = 256;

// The store goes in boxes of 64 rows of 128 bytes.
constexpr int kStoreBytes = kWgmmaM * 128;

constexpr int kAlignment = 1024;  // of a 128-byte-swizzled tile

// Columns of b, about, that the blocks at work share in L2 while they go down the rows of a.
constexpr int kBandCols = 2560;

template <int kBlockN>
struct Stage {
  uint8_t a[kBlockM * kBlockK];
  uint8_t b[kBlockN * kBlockK];
};

// As many stages, and boxes of a warpgroup's store in flight, as fit.
template <int kBlockN>
constexpr int kStages = kBlockN == kNarrow  ? 6
                        : kBlockN == kJoint ? 4
                                            : 5;
template <int kBlockN>
constexpr int kStoreBuffers = kBlockN == kNarrow || kBlockN == kJoint ? 2 : 1;

template <int kBlockN>
struct Shared {
  Stage<kBlockN> stages[kStages<kBlockN>];
  uint8_t store[kConsumers][kStoreBuffers<kBlockN>][kStoreBytes];
  uint64_t full[kStages<kBlockN>];
  uint64_t empty[kStages<kBlockN>];
  uint64_t turn[kConsumers];
  // The cluster's next tiles, as indices into the schedule, the even and the odd ones apart: with
  // turns, a warpgroup sees every phase of its own.
  uint32_t next[kConsumers];
  uint64_t next_full[kConsumers];
  uint64_t next_empty[kConsumers];  // of the first block's, for both
};
template <int kBlockN>
constexpr int kSharedBytes = sizeof(Shared<kBlockN>) + kAlignment;
static_assert(std::max({kSharedBytes<kNarrow>, kSharedBytes<kMedium>, kSharedBytes<kWide>,
                        kSharedBytes<kJoint>}) <= 227 * 1024);

struct Params {
  int batch, m, n, k;
  const float* a_scale;
  const float* b_scale;
  int64_t a_scale_size, b_scale_size;
  const float* u;
  const float* v;
  int rank;
  const float* bias;
  Slope slope;
  bool slope_aligned;  // whether pairs in its rows are, to their size
  void* y;
  DType out_type;
  uint32_t* counter;  // or null, to deal tiles out evenly
  bool bulk_store;
};

// A place in the ring of stages, and the parity of the phase that its barriers are in.
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ void Advance(int steps) {
    stage += steps;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
  __device__ void operator++() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Tile {
  int batch, row, col;  // row and col in elements, of this block
};

// The order of tiles: in bands of columns, down the rows of a band, along the columns of a row.
template <int kBlockN>
struct Schedule {
  int rows, cols, total;  // in clusters
  int band;               // columns of one

  __host__ __device__ Schedule(int batch, int m, int n)
      : rows((m + kCluster * kBlockM - 1) / (kCluster * kBlockM)),
        cols((n + kBlockN - 1) / kBlockN),
        total(batch * rows * cols) {
    // Of about the same width, all of them.
    const int bands = max(1, (cols * kBlockN + kBandCols / 2) / kBandCols);
    band = (cols + bands - 1) / bands;
  }

  __device__ Tile operator[](int index) const {
    const int batch = index / (rows * cols);
    index -= batch * rows * cols;
    const int first = index / (rows * band) * band;
    index -= first * rows;
    const int width = min(band, cols - first);
    const int row = index / width, col = first + index % width;
    return {batch, (row * kCluster + static_cast<int>(ClusterRank())) * kBlockM, col * kBlockN};
  }
};

template <DType kType>
using Type = std::integral_constant<DType, kType>;

// The accumulators of 64 rows and all columns of a tile, over a warpgroup.
template <int kBlockN>
using Sums = float[kBlockN / 2];

// Scales, rank terms and bias, in FP32 and in this order. Register 4 j + 2 h + c of half i is row
// row + 64 i + 8 h and column col + 8 j + c.
template <int kBlockN, int kHalves>
__device__ __forceinline__ void Finish(const Params& p, int batch, int row, int col,
                                       Sums<kBlockN> (&y)[kHalves]) {
  constexpr int kRows = 2 * kHalves;
  const int64_t first_row = int64_t{batch} * p.m, first_col = int64_t{batch} * p.n + col;
  auto of_rows = [&](const float* values, int64_t stride, float (&out)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t in_range = min(row + r / 2 * kWgmmaM + r % 2 * 8, p.m - 1);
      out[r] = values[(first_row + in_range) * stride];
    }
  };
  // Calls f(j, c, value) with the number that every column has in `values`, or with `value`.
  auto for_columns = [&](const float* values, bool per_column, float value, auto f) {
    auto pass = [&](auto inside) {
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
        // Keeps the loads near their use: the registers would not hold them all beside the sums.
        if (j % 8 == 0) asm volatile("" : "+r"(col)::"memory");
        float2 pair = make_float2(value, value);
        if constexpr (decltype(inside)::value) {
          pair = *reinterpret_cast<const float2*>(values + 8 * j);
        } else if (per_column) {
          if (col + 8 * j < p.n) pair.x = values[8 * j];
          if (col + 8 * j + 1 < p.n) pair.y = values[8 * j + 1];
        }
        f(j, 0, pair.x);
        f(j, 1, pair.y);
      }
    };
    const bool aligned = reinterpret_cast<uintptr_t>(values) % sizeof(float2) == 0;
    if (per_column && aligned && col + kBlockN - 7 < p.n) {
      pass(std::true_type());
    } else {
      pass(std::false_type());
    }
  };
  float of_row[kRows];
  if (p.a_scale_size == 1) {
#pragma unroll
    for (float& scale : of_row) scale = p.a_scale[batch];
  } else {
    of_rows(p.a_scale, 1, of_row);
  }
  const bool per_column = p.b_scale_size != 1;
  for_columns(p.b_scale + first_col, per_column, per_column ? 0 : p.b_scale[batch],
              [&](int j, int c, float scale) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                  float& sum = y[r / 2][4 * j + r % 2 * 2 + c];
                  sum = __fmul_rn(__fmul_rn(sum, of_row[r]), scale);
                }
              });
  // The bias is one more rank term, whose column is ones.
  for (int term = 0; term < p.rank + (p.bias != nullptr); ++term) {
    const float* values = p.bias + first_col;
    if (term < p.rank) {
      of_rows(p.u + term, p.rank, of_row);
      values = p.v + (int64_t{batch} * p.rank + term) * p.n + col;
    } else {
#pragma unroll
      for (float& one : of_row) one = 1;
    }
    for_columns(values, true, 0, [&](int j, int c, float value) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& sum = y[r / 2][4 * j + r % 2 * 2 + c];
        sum = __fadd_rn(sum, __fmul_rn(of_row[r], value));
      }
    });
  }
}

// Two neighbouring elements of w, as they lie in memory: 16 bits each in a word, or a float each.
template <DType kType>
using Pair = std::conditional_t<kType == DType::kF32, float2, uint32_t>;

// The pair at `at`; where rows are of odd length an element at a time. Past the end of its row,
// which `last` is, it is not used.
template <DType kType, bool kAligned>
__device__ __forceinline__ Pair<kType> LoadPair(const void* w, int64_t at, bool last) {
  if constexpr (kAligned) {
    return static_cast<const Pair<kType>*>(w)[at / 2];
  } else if constexpr (kType == DType::kF32) {
    const float* from = static_cast<const float*>(w) + at;
    return {from[0], last ? 0 : from[1]};
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(w) + at;
    return from[0] | (last ? 0u : uint32_t{from[1]} << 16);
  }
}

template <DType kType>
__device__ __forceinline__ float2 Unpack(Pair<kType> pair) {
  if constexpr (kType == DType::kF32) {
    return pair;
  } else {
    return {Word<kType>::Get(pair, 0), Word<kType>::Get(pair, 1)};
  }
}

// Has the rows of w that a tile's slope needs brought into L2, before its products begin.
__device__ __forceinline__ void PrefetchSlope(const Params& p, const Tile& tile, int cols) {
  constexpr int kLine = 128;
  const int row = tile.row + threadIdx.x % kWarpgroup;
  static_assert(kBlockM == kWarpgroup);
  if (row >= p.m) return;
  const int bytes = ElementBytes(p.slope.type);
  const char* from = static_cast<const char*>(p.slope.w) +
                     ((int64_t{tile.batch} * p.m + row) * p.n + tile.col) * bytes;
  const int length = min(cols, p.n - tile.col) * bytes;
  for (int i = 0; i < length; i += kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

// Multiplies by the estimator's slope; indices as in Finish.
template <DType kType, bool kAligned, int kBlockN, int kHalves>
__device__ __forceinline__ void MultiplyBySlope(const Params& p, int batch, int row, int col,
                                                Sums<kBlockN> (&sums)[kHalves]) {
  constexpr int kRows = 2 * kHalves;
  // Pairs of a row that are loaded together, as far as there are registers.
  constexpr int kInFlight = (kBlockN == kNarrow ? 8 : 4) / (kType == DType::kF32 ? 2 : 1);
  static_assert(kBlockN / 8 % kInFlight == 0);
  const Slope& slope = p.slope;
  const float* scales = slope.scale + batch * slope.scale_size;
  const bool single = slope.scale_size == 1;
  // What lies past an edge is read inside it and multiplies what is not stored.
  int64_t rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int in_range = min(row + r / 2 * kWgmmaM + r % 2 * 8, p.m - 1);
    rows[r] = (int64_t{batch} * p.m + in_range) * p.n;
  }
#pragma unroll
  for (int first = 0; first < kBlockN / 8; first += kInFlight) {
    Pair<kType> w[kInFlight][kRows];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int x = min(col + 8 * (first + i), kAligned ? p.n - 2 : p.n - 1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        w[i][r] = LoadPair<kType, kAligned>(slope.w, rows[r] + x, x == p.n - 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int x = min(col + 8 * (first + i), p.n - 1), y = min(x + 1, p.n - 1);
      const float2 inverse = {__frcp_rn(scales[single ? 0 : x]), __frcp_rn(scales[single ? 0 : y])};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float* pair = sums[r / 2] + 4 * (first + i) + r % 2 * 2;
        const float2 v = Unpack<kType>(w[i][r]);
        pair[0] = __fmul_rn(pair[0], SlopeAt(__fmul_rn(v.x, inverse.x), slope.k, slope.cap));
        pair[1] = __fmul_rn(pair[1], SlopeAt(__fmul_rn(v.y, inverse.y), slope.k, slope.cap));
      }
    }
    asm volatile("" : "+r"(col)::"memory");  // keeps the next loads out of these registers
  }
}

// Both of 16 bits. A choice an instruction: two ways through the epilogue would take registers.
__device__ __forceinline__ uint32_t Cast(DType type, float first, float second) {
  const __nv_bfloat162 bf16 = __floats2bfloat162_rn(first, second);
  const __half2 f16 = __floats2half2_rn(first, second);
  return type == DType::kBF16 ? reinterpret_cast<const uint32_t&>(bf16)
                              : reinterpret_cast<const uint32_t&>(f16);
}

// Whether y's rows may be of any length: those of a wide tile leave no registers for it.
template <int kBlockN>
constexpr bool kAnyRows = kBlockN == kNarrow;

// Writes 64 rows of a tile, from first_row on, in boxes of 128 bytes a row.
template <int kBytes, int kBlockN>
__device__ __forceinline__ void Store(const Params& p, const CUtensorMap& y_map,
                                      uint8_t (&buffers)[kStoreBuffers<kBlockN>][kStoreBytes],
                                      int barrier, const Tile& tile, int first_row,
                                      const Sums<kBlockN>& y) {
  constexpr int kBuffers = kStoreBuffers<kBlockN>;
  constexpr int kBoxCols = 128 / kBytes;
  constexpr int kBoxes = (kBlockN + kBoxCols - 1) / kBoxCols;
  // Buffers come in the same order in every call.
  static_assert(kBlockN % 16 == 0 && kBoxCols % 16 == 0 && kBoxes % kBuffers == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    // The last box may reach back over columns that are written already, with the same values.
    constexpr int kLast = kBlockN - kBoxCols;
    const int box_col = box * kBoxCols < kLast ? box * kBoxCols : kLast;
    uint8_t* buffer = buffers[box % kBuffers];
    if (thread == 0) TensorStoreWaitRead<kBuffers - 1>();
    NamedBarrier(barrier, kWarpgroup);
    // The copy engine's 128-byte swizzle: it also spreads a warp's writes over all banks.
    auto at = [&](int row, int byte) {
      return buffer + row * 128 + ((byte / 16 ^ row % 8) * 16 + byte % 16);
    };
    int warp_row = thread / kWarp * 16;
    // Addresses are reckoned anew for every box: kept, they would take registers of the sums.
    asm volatile("" : "+r"(warp_row));
#pragma unroll
    for (int j = 0; j < kBoxCols / 8; j += 2) {
      const float* sums = y + (box_col / 8 + j) * 4;
      if constexpr (kBytes == 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = Cast(p.out_type, sums[2 * i], sums[2 * i + 1]);
        StoreMatrices(at(warp_row + lane % 16, 16 * (j + lane / 16)), pairs);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_row + lane / 4 + i % 2 * 8;
          *reinterpret_cast<float2*>(at(row, 32 * (j + i / 2) + 8 * (lane % 4))) =
              make_float2(sums[2 * i], sums[2 * i + 1]);
        }
      }
    }
    const int first_col = tile.col + box_col;
    if (!kAnyRows<kBlockN> || p.bulk_store) {
      FenceAsyncProxy();
      NamedBarrier(barrier, kWarpgroup);
      if (thread == 0) {
        TensorStore(&y_map, buffer, first_col, first_row, tile.batch);
        TensorStoreCommit();
      }
    } else {
      // Rows that the copy engine cannot address go out an element at a time.
      NamedBarrier(barrier, kWarpgroup);
      const int rows = min(kWgmmaM, p.m - first_row), cols = min(kBoxCols, p.n - first_col);
      using Element = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
      Element* y_box =
          static_cast<Element*>(p.y) + (int64_t{tile.batch} * p.m + first_row) * p.n + first_col;
      for (int i = thread; i < kWgmmaM * kBoxCols; i += kWarpgroup) {
        const int row = i / kBoxCols, col = i % kBoxCols;
        if (row < rows && col < cols) {
          y_box[int64_t{row} * p.n + col] =
              *reinterpret_cast<const Element*>(at(row, col * kBytes));
        }
      }
    }
  }
}

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote, bool kSlope>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    GemmKernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
               const __grid_constant__ CUtensorMap y_map, const Params p) {
  // A warpgroup's share of the tiles, and of a tile: every second one whole, or half of every one.
  constexpr int kTurns = kPromote || kBlockN == kJoint ? 1 : kConsumers;
  constexpr int kHalves = kTurns == 1 ? 1 : kBlockM / kWgmmaM;
  constexpr int kSharers = kConsumers / kTurns;  // warpgroups of a tile
  constexpr int kWarps = kWarpgroup / kWarp;

  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kBlockN>*>(
      (reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) / kAlignment * kAlignment);
  // Broadcast, so that the compiler keeps in uniform registers what follows from it.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  const int k_blocks = (p.k + kBlockK - 1) / kBlockK;
  const Schedule<kBlockN> schedule(p.batch, p.m, p.n);
  const int cluster = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages<kBlockN>; ++s) {
      BarrierInit(&shared.full[s], 1);
      // Every warp that reads a stage, in both blocks, since each block writes into the other's.
      BarrierInit(&shared.empty[s], kCluster * kSharers * kWarps);
    }
    for (int w = 0; w < kConsumers; ++w) {
      BarrierInit(&shared.turn[w], 1);
      BarrierInit(&shared.next_full[w], 1);
      BarrierExpect(&shared.next_full[w], sizeof(uint32_t));
      // Those warps, and the one that loads.
      BarrierInit(&shared.next_empty[w], kCluster * (kSharers * kWarps + 1));
    }
    FenceBarrierInit();
  }
  ClusterSync();

  // The index of this cluster's tile number `turn`, once it is known; past the last one's it ends.
  const int lane = threadIdx.x % kWarp;
  auto next_tile = [&](int turn) {
    const int slot = turn % kConsumers;
    BarrierWait(&shared.next_full[slot], turn / kConsumers & 1);
    // By all lanes at once. An arrival does not wait for a load before it, so giving the place up is
    // made to depend on what was read.
    const int index = __shfl_sync(~0u, LoadShared(&shared.next[slot]), 0);
    if (lane == 0 && index >= 0) BarrierArriveRemote(&shared.next_empty[slot], 0);
    return index;
  };

  if (warpgroup == kConsumers) {
    RegistersDecrease<kProducerRegisters>();
    const int warp = threadIdx.x % kWarpgroup / kWarp;
    if (warp == 0) {
      constexpr int kPartN = kBlockN / kCluster;
      const int part = ClusterRank() * kPartN;
      Ring<kStages<kBlockN>> ring;
      for (int turn = 0;; ++turn) {
        const int index = next_tile(turn);
        if (index >= schedule.total) break;
        if (lane == 0) {
          BarrierExpect(&shared.next_full[turn % kConsumers], sizeof(uint32_t));
          const Tile tile = schedule[index];
          for (int kb = 0; kb < k_blocks; ++kb, ++ring) {
            Stage<kBlockN>& stage = shared.stages[ring.stage];
            uint64_t* full = &shared.full[ring.stage];
            BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
            BarrierExpect(full, sizeof(stage));
            TensorLoad(stage.a, &a_map, full, kb * kBlockK, tile.row, tile.batch);
            TensorLoadMulticast(stage.b + part * kBlockK, &b_map, full, (1 << kCluster) - 1,
                                kb * kBlockK, tile.col + part, tile.batch);
          }
        }
        __syncwarp();
      }
    } else if (warp == 1 && ClusterRank() == 0 && lane == 0) {
      // Hands out tiles to both blocks, in the order of the schedule; at the end one index past it
      // for each of those who take turns.
      int index = cluster;
      for (int turn = 0, ends = 0; ends < kTurns; ++turn) {
        const int slot = turn % kConsumers;
        BarrierWait(&shared.next_empty[slot], (turn / kConsumers & 1) ^ 1);
        for (int rank = 0; rank < kCluster; ++rank) {
          StoreRemote(&shared.next[slot], index, &shared.next_full[slot], rank);
        }
        if (index >= schedule.total) {
          ++ends;
        } else if (p.counter == nullptr) {
          index += clusters;
        } else {
          index = clusters + static_cast<int>(atomicAdd(p.counter, 1));
        }
      }
    }
  } else {
    RegistersIncrease<kConsumerRegisters>();
    const int warp_row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
    const int first = kTurns == 1 ? 0 : warpgroup;  // of the tiles that it takes
    // A warpgroup begins a tile when the other has seen all of the tile before arrive. Only then do
    // the parities of the full stages tell the phase it waits for from the one before the last.
    int turn_parity = first == 0 ? 1 : 0;
    const int block_row = kTurns == 1 ? warpgroup * kWgmmaM : 0;
    auto release = [&](int stage) {
      if (lane < kCluster) BarrierArriveRemote(&shared.empty[stage], lane);
    };
    Ring<kStages<kBlockN>> ring;
    ring.Advance(first * k_blocks);
    for (int turn = first;; turn += kTurns) {
      const int index = next_tile(turn);
      if (index >= schedule.total) break;
      const Tile tile = schedule[index];
      if constexpr (kSlope) PrefetchSlope(p, tile, kBlockN);
      Sums<kBlockN> sums[kHalves];
      if constexpr (kPromote) {
#pragma unroll
        for (float& sum : sums[0]) sum = 0;
      }
      if constexpr (kTurns > 1) {
        BarrierWait(&shared.turn[first], turn_parity);
        turn_parity ^= 1;
      }
      int last = 0;
      for (int kb = 0; kb < k_blocks; ++kb, ++ring) {
        BarrierWait(&shared.full[ring.stage], ring.parity);
        const Stage<kBlockN>& stage = shared.stages[ring.stage];
        const uint64_t a = WgmmaDescriptor(stage.a + block_row * kBlockK);
        const uint64_t b = WgmmaDescriptor(stage.b);
        Sums<kBlockN> partial;
        auto multiply = [&](Sums<kBlockN>& to, int half, int i, bool accumulate) {
          const uint64_t along_k = i * kWgmmaK >> 4;
          const uint64_t along_m = half * kWgmmaM * kBlockK >> 4;
          Wgmma<kBlockN, kAE5M2, kBE5M2>(to, a + along_k + along_m, b + along_k, accumulate);
        };
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < kBlockK / kWgmmaK; ++i) {
          if constexpr (kPromote) {
            multiply(partial, 0, i, i > 0);
          } else {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
              multiply(sums[half], half, i, kb > 0 || i > 0);
            }
          }
        }
        WgmmaCommit();
        if constexpr (kTurns > 1) {
          // The other warpgroup's first products queue up behind the last ones of this tile.
          if (kb == k_blocks - 1 && threadIdx.x % kWarpgroup == 0) {
            BarrierArrive(&shared.turn[kTurns - 1 - first]);
          }
        }
        if constexpr (kPromote) {
          WgmmaWait<0>();
          release(ring.stage);
#pragma unroll
          for (int i = 0; i < kBlockN / 2; ++i) sums[0][i] += partial[i];
        } else {
          // The products before these are done: their stage may be filled again.
          WgmmaWait<1>();
          if (kb > 0) release(last);
          last = ring.stage;
        }
      }
      if constexpr (!kPromote) {
        WgmmaWait<0>();
        release(last);
        // Over the steps of the other warpgroup's tile.
        ring.Advance((kTurns - 1) * k_blocks);
      }
      const int row = tile.row + block_row + warp_row, col = tile.col + 2 * (lane % 4);
      Finish<kBlockN>(p, tile.batch, row, col, sums);
      if constexpr (kSlope) {  // its registers would be every other product's too
        auto multiply = [&](auto type, auto aligned) {
          MultiplyBySlope<decltype(type)::value, decltype(aligned)::value, kBlockN>(p, tile.batch,
                                                                                    row, col, sums);
        };
        auto of_type = [&](auto type) {
          if (p.slope_aligned) {
            multiply(type, std::true_type());
          } else {
            multiply(type, std::false_type());
          }
        };
        if (p.slope.type == DType::kBF16) of_type(Type<DType::kBF16>());
        if (p.slope.type == DType::kF16) of_type(Type<DType::kF16>());
        if (p.slope.type == DType::kF32) of_type(Type<DType::kF32>());
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        auto store = [&](auto bytes) {
          Store<decltype(bytes)::value, kBlockN>(p, y_map, shared.store[warpgroup], 1 + warpgroup,
                                                 tile, tile.row + block_row + half * kWgmmaM,
                                                 sums[half]);
        };
        if (p.out_type == DType::kF32) {
          store(std::integral_constant<int, 4>());
        } else {
          store(std::integral_constant<int, 2>());
        }
      }
    }
    if (threadIdx.x % kWarpgroup == 0) TensorStoreWaitRead<0>();
  }
  // No block leaves while the other may still write into its shared memory.
  __syncwarp();
  ClusterSync();
}

int OutBytes(DType type) { return type == DType::kF32 ? 4 : 2; }

// Up to so many tiles a cluster, none gets far enough ahead of the others for it to pay to zero the
// counter.
constexpr int kFewTurns = 6;

// Whether y's rows are multiples of 16 bytes, as the copy engine wants them.
bool HasBulkRows(const Gemm& g) {
  return g.n * OutBytes(g.out_type) % 16 == 0 && reinterpret_cast<uintptr_t>(g.y) % 16 == 0;
}

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote, bool kSlope>
cudaError_t Launch(const Gemm& g, int clusters, cudaStream_t stream) {
  const int tiles = Schedule<kBlockN>(g.batch, g.m, g.n).total;
  const bool deals = tiles <= kFewTurns * clusters;
  const Params p{static_cast<int>(g.batch),
                 static_cast<int>(g.m),
                 static_cast<int>(g.n),
                 static_cast<int>(g.k),
                 g.a_scale,
                 g.b_scale,
                 g.a_scale_size,
                 g.b_scale_size,
                 g.u,
                 g.v,
                 static_cast<int>(g.rank),
                 g.bias,
                 g.slope,
                 g.n % 2 == 0 && reinterpret_cast<uintptr_t>(g.slope.w) % sizeof(float2) == 0,
                 g.y,
                 g.out_type,
                 deals ? nullptr : g.counter,
                 HasBulkRows(g)};
  CUtensorMap a_map, b_map, y_map{};
  cudaError_t status = MakeTensorMap(&a_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.a, g.batch, g.m,
                                     g.k, kBlockM, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B);
  if (status != cudaSuccess) return status;
  status = MakeTensorMap(&b_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.b, g.batch, g.n, g.k,
                         kBlockN / kCluster, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B);
  if (status != cudaSuccess) return status;
  if (p.bulk_store) {
    const CUtensorMapDataType type = g.out_type == DType::kBF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : g.out_type == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const int bytes = OutBytes(g.out_type);
    status = MakeTensorMap(&y_map, type, bytes, g.y, g.batch, g.m, g.n, kWgmmaM, 128 / bytes,
                           CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
  }
  if (p.counter != nullptr) {
    status = cudaMemsetAsync(p.counter, 0, sizeof(*p.counter), stream);
    if (status != cudaSuccess) return status;
  }
  auto kernel = GemmKernel<kBlockN, kAE5M2, kBE5M2, kPromote, kSlope>;
  constexpr int kBytes = kSharedBytes<kBlockN>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  clusters = std::min(clusters, tiles);
  kernel<<<clusters * kCluster, kThreads, kBytes, stream>>>(a_map, b_map, y_map, p);
  return cudaGetLastError();
}

bool HasSlope(const Gemm& g) { return g.slope.w != nullptr; }

// About how long a product takes with tiles of this width: columns that a cluster computes one
// after the other, in units of a column of a wide tile. The factors were measured on products that
// fill the GPU; a joint tile's epilogue takes as long as 400 steps of 1 along k.
template <int kBlockN>
float Cost(const Gemm& g, int clusters) {
  const int64_t tiles = Schedule<kBlockN>(g.batch, g.m, g.n).total;
  const float factor = kBlockN == kNarrow   ? 1.1f
                       : kBlockN == kMedium ? 1.03f
                       : kBlockN == kWide   ? 1.0f
                                            : 0.985f + 400.0f / g.k;
  return (tiles + clusters - 1) / clusters * kBlockN * factor;
}

int ChooseWidth(const Gemm& g, int clusters) {
  if (g.promote || !HasBulkRows(g)) return kNarrow;
  const std::pair narrow(Cost<kNarrow>(g, clusters), kNarrow);
  const std::pair wide(Cost<kWide>(g, clusters), kWide);
  // An epilogue with a slope is too long to be shown, as a joint tile's would be.
  if (HasSlope(g)) return std::min(narrow, wide).second;
  const std::pair medium(Cost<kMedium>(g, clusters), kMedium);
  const std::pair joint(Cost<kJoint>(g, clusters), kJoint);
  return std::min({narrow, medium, wide, joint}).second;
}

}  // namespace

cudaError_t LaunchGemm(const Gemm& g, cudaStream_t stream) {
  if (g.batch == 0 || g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.k == 0 || g.k % 16 != 0 || (g.a_e5m2 && g.b_e5m2)) return cudaErrorInvalidValue;
  // Coordinates of the copy engine are 32 bits wide.
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  if (std::max({g.batch, g.m, g.n, g.k, g.rank}) > kMaxSize) return cudaErrorInvalidValue;
  int device, sms;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int clusters = sms / kCluster;
  auto launch = [&](auto block_n, auto promote, auto slope) {
    constexpr int kBlockN = block_n();
    constexpr bool kPromote = promote(), kSlope = slope();
    auto of_types = g.a_e5m2   ? Launch<kBlockN, true, false, kPromote, kSlope>
                    : g.b_e5m2 ? Launch<kBlockN, false, true, kPromote, kSlope>
                               : Launch<kBlockN, false, false, kPromote, kSlope>;
    return of_types(g, clusters, stream);
  };
  using No = std::false_type;
  using Yes = std::true_type;
  const std::integral_constant<int, kNarrow> narrow;
  const std::integral_constant<int, kMedium> medium;
  const std::integral_constant<int, kWide> wide;
  const std::integral_constant<int, kJoint> joint;
  const bool slope = HasSlope(g);
  if (g.promote) return slope ? launch(narrow, Yes(), Yes()) : launch(narrow, Yes(), No());
  switch (ChooseWidth(g, clusters)) {
    case kMedium:
      return launch(medium, No(), No());
    case kWide:
      return slope ? launch(wide, No(), Yes()) : launch(wide, No(), No());
    case kJoint:
      return launch(joint, No(), No());
  }
  return slope ? launch(narrow, No(), Yes()) : launch(narrow, No(), No());
}

}  // namespace jfp4
