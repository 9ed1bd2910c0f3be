// A scale a column, in one read: a cluster of blocks divides a strip of the matrix and holds it in
// shared memory until its columns' scales are known. It does so in pieces, each of one warp alone:
// the warp waits for its pieces, finds their largest magnitudes, and, once the cluster has agreed
// on the scales, writes their codes in both layouts and loads pieces of a later strip in their
// place. So no warp waits for another but for the scales, and the next strip has come, or is
// coming, meanwhile. Of a strip that is too long to be held, the first pieces make room for the
// last and are loaded again.
#include "cuda_ffi/kernels/quantize.cuh"
#include "cuda_ffi/kernels/quantize_any.h"
#include "cuda_ffi/kernels/tile_counter.cuh"

namespace jfp4 {
namespace {

// A piece: what the copy engine loads at once. A lane has the codes of one vector of each of eight
// rows: eight bytes of every column of the vector. Strips are as narrow as whole sectors of codes
// allow, since the narrower they are the more of them are held at a time.
constexpr int kPieceCols = 32;
constexpr int kLaneRows = 8;
constexpr int kPieceBytes = kWarp * kLaneRows * kVectorBytes;
template <DType kType>
struct Piece {
  static constexpr int kVectors = kPieceCols / kPerVector<kType>;  // in a row
  static constexpr int kRowGroups = kWarp / kVectors;
  static constexpr int kRows = kRowGroups * kLaneRows;
};

constexpr int kCluster = 8;     // the largest that every device of this architecture can schedule
constexpr int kMaxWarps = 27;   // of a block
constexpr int kMaxPieces = 54;  // that a block holds, which then has a multiprocessor to itself

// Clusters are not equally fast. Where each would have more strips than these, it takes them from a
// counter; to begin that takes longer than few strips are worth.
constexpr int kDealt = 6;
constexpr int kAhead = 2;  // turns for which a cluster knows its strips

// What a block keeps behind its pieces. The largest magnitudes that the cluster has found are those
// of this strip and of the last by turns; reciprocals of scales are NaN where those are.
struct Shared {
  uint32_t block_amax[2][kPieceCols];
  uint32_t cluster_amax[2][kPieceCols];
  float inverses[kPieceCols];
  uint32_t strips[2 * kAhead];  // of turns, by turns
  uint32_t later;               // strip, to be sent to the cluster's blocks
  uint64_t agreed[2];           // barriers
};

// With one barrier a piece.
constexpr int SharedBytes(int pieces) {
  return sizeof(Shared) + pieces * (kPieceBytes + sizeof(uint64_t));
}

static_assert(SharedBytes(kMaxPieces) <= 227 << 10);

// Raises a number in the shared memory of another block of the cluster and counts its bytes on the
// barrier there.
__device__ __forceinline__ void RaiseRemote(uint32_t* number, uint64_t* barrier, uint32_t rank,
                                            uint32_t to) {
  asm volatile(
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 "
      "[%0], %1, [%2];" ::"r"(MapToRank(SharedAddress(number), rank)),
      "r"(to), "r"(MapToRank(SharedAddress(barrier), rank))
      : "memory");
}

// Lanes that have the same columns share these: each gets the maxima over such lanes, kStride
// apart, of its part of the values.
template <int kLanes, int kStride, int kCount, int kSize>
__device__ __forceinline__ void ShareMaxima(uint32_t (&values)[kSize]) {
  if constexpr (kLanes > 1) {
    constexpr int kOther = kLanes / 2 * kStride, kHalf = kCount / 2;
    static_assert(kHalf > 0);
    const bool upper = (threadIdx.x & kOther) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const uint32_t given = upper ? values[i] : values[i + kHalf];
      const uint32_t kept = upper ? values[i + kHalf] : values[i];
      values[i] = max(kept, __shfl_xor_sync(~0u, given, kOther));
    }
    ShareMaxima<kLanes / 2, kStride, kHalf>(values);
  }
}

// A warp's places for pieces are a ring, at most `slots` long, which goes on from strip to strip.
template <DType kType, Format kFormat, Clip kClip>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    StripKernel(const __grid_constant__ CUtensorMap map,
                const __grid_constant__ QuantizeColumns args, const int slots) {
  constexpr int kElements = kPerVector<kType>, kVectors = Piece<kType>::kVectors;
  constexpr int kRowGroups = Piece<kType>::kRowGroups, kPieceRows = Piece<kType>::kRows;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int vector = lane % kVectors, group = lane / kVectors;
  // Where a row has half of the banks, groups beside each other read rows of either half.
  const int odd = kVectors * kVectorBytes < 4 * kBanks ? group % 2 : 0;
  uint8_t* const held = memory + warp * slots * kPieceBytes;
  auto& shared = *reinterpret_cast<Shared*>(memory + warps * slots * kPieceBytes);
  uint64_t* const loaded = reinterpret_cast<uint64_t*>(&shared + 1) + warp * slots;

  const int64_t rows = args.in.rows, cols = args.in.cols;
  const uint32_t across = TileCount(cols, kPieceCols), strips = args.in.batch * across;
  const uint32_t rank = ClusterRank(), step = gridDim.x / kCluster;
  const int pieces = TileCount(rows, kPieceRows), per_block = (pieces + kCluster - 1) / kCluster;
  // The warp's pieces of every strip, `warps` apart.
  const int first = rank * per_block + warp;
  const int last = min(static_cast<int>(rank + 1) * per_block, pieces);
  const int count = first < last ? (last - first + warps - 1) / warps : 0;

  const uint32_t cluster = blockIdx.x / kCluster;
  const auto strip_of = [&](uint32_t turn) {
    return turn < kAhead ? cluster + turn * step : shared.strips[turn % (2 * kAhead)];
  };
  const int ring = min(slots, kAhead * count);

  // Loads what comes next into a slot: the pieces of a strip, then those that have made room again.
  uint32_t next_turn = 0;
  int next = 0;
  const int loads = count + max(count - ring, 0);
  const auto load = [&](int slot) {
    if (count == 0) return;
    const uint32_t strip = strip_of(next_turn);
    if (strip >= strips) return;
    if (lane == 0) {
      const int piece = first + (next < count ? next : next - count) * warps;
      BarrierExpect(&loaded[slot], kPieceBytes);
      TensorLoad(held + slot * kPieceBytes, &map, &loaded[slot], strip % across * kPieceCols,
                 piece * kPieceRows, strip / across);
    }
    if (++next == loads) {
      next = 0;
      ++next_turn;
    }
  };
  // Waits for the load into a slot, which are waited for in the order of the ring.
  uint32_t parity = 0;
  const auto wait = [&](int slot) {
    BarrierWait(&loaded[slot], parity);
    if (slot == ring - 1) parity ^= 1;
  };
  const auto after = [&](int slot) { return slot + 1 == ring ? 0 : slot + 1; };

  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < slots; ++i) BarrierInit(&loaded[i], 1);
    if (warp == 0) {
      BarrierInit(&shared.agreed[0], 1);
      BarrierInit(&shared.agreed[1], 1);
    }
    FenceBarrierInit();
  }
  const int needed = min(ring, count);
#pragma unroll 1
  for (int i = 0; i < needed; ++i) load(i);
  for (int i = threadIdx.x; i < kPieceCols; i += blockDim.x) {
    shared.block_amax[0][i] = shared.cluster_amax[0][i] = 0;
    shared.block_amax[1][i] = shared.cluster_amax[1][i] = 0;
  }
  // A number is taken for every strip, and one by every cluster at the start.
  auto* const counter = reinterpret_cast<TileCounter*>(args.amax);
  const uint32_t last_number = strips + step - 1;
  const bool takes = strips > kDealt * step && rank == 0 && threadIdx.x == 0;
  uint32_t number = 0;
  if (takes) number = TakeNumber(counter, last_number);
  __syncwarp();
  ClusterSync();
  // What can wait comes after what all wait for.
#pragma unroll 1
  for (int i = needed; i < ring; ++i) load(i);

  int oldest = 0;  // slot
  uint32_t turns = 0;
  for (uint32_t strip = cluster; strip < strips; strip = strip_of(++turns)) {
    const uint32_t turn = turns & 1;
    const int64_t batch = strip / across, first_col = int64_t{strip % across} * kPieceCols;
    Limits limits = {};
    if constexpr (kClip != Clip::kNone) limits = LoadLimits(args.outliers, batch);

    // Groups have rows in turn, which is another order than below: all banks are read in both.
    Extremes<kType, kClip> extremes[4];
    for (int i = 0, slot = oldest; i < count; ++i, slot = after(slot)) {
      wait(slot);
      const uint4* from = reinterpret_cast<const uint4*>(held + slot * kPieceBytes) + lane;
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) {
        const uint4 v = from[j * kWarp];
        extremes[0].Include(v.x);
        extremes[1].Include(v.y);
        extremes[2].Include(v.z);
        extremes[3].Include(v.w);
      }
      if (i + ring < count) {
        // A copy waits for no load: what was read must be here before it is written over.
#pragma unroll
        for (const Extremes<kType, kClip>& e : extremes) asm volatile("" ::"r"(e.high), "r"(e.low));
        __syncwarp();
        load(slot);
        oldest = after(slot);
      }
    }
    constexpr int kPerWord = Word<kType>::kElements;
    uint32_t amax[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      amax[i] = extremes[i / kPerWord].Magnitude(i % kPerWord, limits);
    }
    ShareMaxima<kRowGroups, kVectors, kElements>(amax);
    constexpr int kEach = kElements / kRowGroups;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      atomicMax(&shared.block_amax[turn][vector * kElements + group * kEach + i], amax[i]);
    }
    if (rank == 0 && threadIdx.x == 0) {
      shared.later = takes ? kAhead * step + number : cluster + (turns + kAhead) * step;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      BarrierExpect(&shared.agreed[turn], sizeof(uint32_t) * (kCluster * kPieceCols + 1));
    }
    if (rank == 0 && threadIdx.x < kCluster) {
      StoreRemote(&shared.strips[(turns + kAhead) % (2 * kAhead)], shared.later,
                  &shared.agreed[turn], threadIdx.x);
    }
    for (int i = threadIdx.x; i < kCluster * kPieceCols; i += blockDim.x) {
      RaiseRemote(&shared.cluster_amax[turn][i % kPieceCols], &shared.agreed[turn], i / kPieceCols,
                  shared.block_amax[turn][i % kPieceCols]);
    }
    for (int i = threadIdx.x; i < kPieceCols; i += blockDim.x) {
      BarrierWait(&shared.agreed[turn], turns >> 1 & 1);
      uint32_t all = shared.cluster_amax[turn][i];
      shared.block_amax[turn ^ 1][i] = shared.cluster_amax[turn][i] = 0;
      if (first_col + i >= cols) continue;
      const int64_t slice = batch * cols + first_col + i;
      if (args.amax_floor != nullptr) all = max(all, __float_as_uint(args.amax_floor[slice]));
      const float scale = ScaleOf(all, kFormat);
      if (rank == 0) args.scale[slice] = scale;
      shared.inverses[i] = __frcp_rn(scale);
    }
    __syncthreads();

    if (takes) number = atomicAdd(&counter->next, 1);  // which is here by the next turn
    Scaling<kElements> scaling;
    scaling.SetEach(shared.inverses + vector * kElements);
    const int64_t col = first_col + vector * kElements;
    for (int i = 0; i < count; ++i, oldest = after(oldest)) {
      // From the first of those that are held on, then those that are loaded again.
      if (i >= ring) wait(oldest);
      const int piece = i + max(count - ring, 0);
      const int64_t row =
          int64_t{first + (piece < count ? piece : piece - count) * warps} * kPieceRows +
          group * kLaneRows;
      if (row < rows && col < cols) {
        const uint4* from = reinterpret_cast<const uint4*>(held + oldest * kPieceBytes) +
                            group * kLaneRows * kVectors + vector;
        const int64_t at = (batch * rows + row) * cols + col;
        const int64_t at_t = (batch * cols + col) * rows + row;
        uint32_t columns[kElements][kLaneRows / 4];
#pragma unroll
        for (int j = 0; j < kLaneRows / 4; ++j) {
          uint32_t words[kElements / 4][4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int r = (4 * j + k) ^ odd;
            uint32_t codes[kElements / 4];
            EncodeVector<kType, kFormat, kClip>(from[r * kVectors], scaling, limits, codes);
            if (args.codes != nullptr) StoreBytes(args.codes + at + r * cols, codes);
#pragma unroll
            for (int l = 0; l < kElements / 4; ++l) words[l][k] = codes[l];
          }
#pragma unroll
          for (int l = 0; l < kElements / 4; ++l) TransposeWords(words[l], columns + 4 * l, j, odd);
        }
        if (args.codes_t != nullptr) {
#pragma unroll
          for (int k = 0; k < kElements; ++k) {
            StoreBytes(args.codes_t + at_t + k * rows, columns[k]);
          }
        }
        if (args.packed_t != nullptr) {
#pragma unroll
          for (int k = 0; k < kElements; ++k) {
            StoreNibbles(args.packed_t + (at_t + k * rows) / 2, columns[k]);
          }
        }
      }
      __syncwarp();
      load(oldest);
    }
  }
  if (takes && number == last_number) counter->state = 0;
}

// --- launching ---

int64_t StripsOf(const QuantizeInput& in) { return in.batch * CeilDiv(in.cols, kPieceCols); }

template <DType kType, Format kFormat, Clip kClip>
cudaError_t LaunchStrips(const QuantizeColumns& args, cudaStream_t stream) {
  constexpr CUtensorMapDataType kMapType = kType == DType::kBF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                           : kType == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const QuantizeInput& in = args.in;
  CUtensorMap map;
  cudaError_t error = MakeTensorMap(&map, kMapType, ElementBytes(kType), in.x, in.batch, in.rows,
                                    in.cols, Piece<kType>::kRows, kPieceCols,
                                    CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  if (error != cudaSuccess) return error;
  // As many places as a block has pieces of two strips, or can have, and one or two of each strip
  // for a warp. With few, several blocks share a multiprocessor.
  const int64_t all = CeilDiv(CeilDiv(in.rows, Piece<kType>::kRows), kCluster);
  const int pieces = static_cast<int>(std::min<int64_t>(all, kMaxPieces));
  const int warps = CeilDiv(pieces, CeilDiv(pieces, kMaxWarps));
  const int slots = std::min(2 * pieces, kMaxPieces) / warps;
  const auto kernel = StripKernel<kType, kFormat, kClip>;
  const int bytes = SharedBytes(warps * slots);
  // The most that any call wants: the bound is the process's, and another thread may be between
  // setting it and launching.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               SharedBytes(kMaxPieces));
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute cluster = ClusterOf(kCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(StripsOf(in) * kCluster));
  config.blockDim = dim3(warps * kWarp);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  // No more clusters than are on the device at once, which is not what its multiprocessors add up
  // to, for a cluster has all of its blocks within one of their groups: a cluster too many would
  // take all its strips when the others are done with theirs.
  int clusters;
  error = ClustersAtOnce(reinterpret_cast<const void*>(kernel), config, &clusters);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorLaunchOutOfResources;
  config.gridDim.x = std::min<int64_t>(clusters, StripsOf(in)) * kCluster;
  return cudaLaunchKernelEx(&config, kernel, map, args, slots);
}

cudaError_t LaunchStrips(const QuantizeColumns& args, cudaStream_t stream) {
  return WithAll(args.in.type, args.format, args.outliers, [&](auto type, auto format, auto clip) {
    return LaunchStrips<type(), format(), clip()>(args, stream);
  });
}

// Coordinates of the copy engine are 32 bits wide, and so are the numbers of blocks.
bool HasCoordinates(const QuantizeInput& in) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  return in.batch <= kMax && in.rows <= kMax && in.cols <= kMax && StripsOf(in) <= kMax / kCluster;
}

}  // namespace

cudaError_t LaunchQuantizeColumns(const QuantizeColumns& args, cudaStream_t stream) {
  const QuantizeInput& in = args.in;
  if (in.batch == 0) return cudaSuccess;
  if (HasVectors(in, args.codes, nullptr) && HasGroups(in, args.codes_t, args.packed_t) &&
      HasCoordinates(in) && IsAligned(args.amax, alignof(TileCounter))) {
    return LaunchStrips(args, stream);
  }
  Any any = {in, args.outliers, args.format};
  any.col_scale = args.scale;
  any.col_amax = args.amax;
  any.amax_floor = args.amax_floor;
  any.codes = args.codes;
  any.codes_t = args.codes_t;
  any.packed_t = args.packed_t;
  return LaunchAny(any, stream);
}

}  // namespace jfp4
