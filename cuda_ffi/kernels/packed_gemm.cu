// The codes of b stream once from memory, so everything serves keeping enough of their bytes in
// flight, and as many on one multiprocessor as on the next. A cluster of blocks computes one tile
// of y, each block over its own share of k; there is one block on a multiprocessor, and the tiles
// are as high as it takes for all blocks to run at once with equal shares of b.
//
// Tensor cores read E4M3: the nibble s e e m, placed as the byte s 0 0 e e m 0 0, is its E2M1 value
// times 2^-6 exactly, subnormals included, so unpacking is shifts and masks and no table. Rows of b
// are the 64 rows of a wgmma, from registers; rows of a are its columns, from shared memory.
//
// The copy engine brings nibbles of a and of b into stages of a ring, a step along k into each;
// four warps unpack those of a into another ring, and four warpgroups unpack b into registers and
// multiply, the next codes while the last ones are being multiplied. (Warps that unpack must not
// load from memory: the fence between their stores and the tensor cores waits for loads as well,
// and so for those of steps to come.) At the end the warpgroups of the cluster that have the same
// rows read each other's sums of their share of the tokens, and finish y in registers. The sums are
// exact, so that neither their number nor their order shows in y.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/packed_codes.cuh"
#include "cuda_ffi/kernels/packed_epilogue.cuh"
#include "cuda_ffi/kernels/packed_gemm.h"
#include "cuda_ffi/kernels/packed_tile.cuh"

namespace jfp4 {
namespace {

using namespace packed;

// Coordinates of the copy engine, and numbers of blocks, are 32 bits wide.
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// The order of codes along k is free as long as both operands keep to it. The even codes of a chunk
// are the first half of a wgmma's 32 bytes along k, the odd ones the second half; lane q of a quad
// has word q of the chunk, and so bytes 4 q and 16 + 4 q, which are those it supplies.

// Everything is set up once all threads have been here.
__device__ __forceinline__ void SetUp() { NamedBarrier(0, kThreads); }

// Starts the copies of a step into its stage, of a first, since its codes wait in shared memory for
// b's. What lies past an edge reads as zero.
template <int kTokens>
__device__ __forceinline__ void CopyStep(const Params& p, const CUtensorMap& a_map,
                                         const CUtensorMap& b_map, const Work& work, int step,
                                         int slot, Shared<kTokens>& shared) {
  Fixed<kTokens>& fixed = shared.fixed;
  uint8_t* stage = shared.rings + p.code_slots * kTokenCodes<kTokens> + slot * p.stage_bytes;
  const int column = (work.begin + step) * kStageRowBytes;
  BarrierExpect(&fixed.a_full[slot], kTokenNibbles<kTokens>);
  TensorLoad(stage, &a_map, &fixed.a_full[slot], column, work.first_token, work.batch);
  BarrierExpect(&fixed.b_full[slot], p.rows * kStageRowBytes);
  TensorLoad(stage + kTokenNibbles<kTokens>, &b_map, &fixed.b_full[slot], column, work.first_row,
             work.batch);
}

// One thread's part before SetUp: the first copies wait for no other thread, and for no barriers
// but their own. A barrier is initialised at a uniform address, so lanes with one each would take
// turns, and each turn has a fence: one thread that knows all addresses is faster, and needs one
// fence.
template <int kTokens>
__device__ __forceinline__ void StartCopies(const Params& p, const CUtensorMap& a_map,
                                            const CUtensorMap& b_map, const Work& work,
                                            Shared<kTokens>& shared) {
  Fixed<kTokens>& fixed = shared.fixed;
  if (work.steps > 0) {
    PrefetchTensorMap(&b_map);
    PrefetchTensorMap(&a_map);
  }
#pragma unroll
  for (int s = 0; s < kMaxStages; ++s) {
    BarrierInit(&fixed.b_full[s], 1);
    BarrierInit(&fixed.a_full[s], 1);
  }
  FenceBarrierInit();
  FenceAsyncProxy();
#pragma unroll 1
  for (int step = 0; step < min(p.stages, work.steps); ++step) {
    CopyStep(p, a_map, b_map, work, step, step, shared);
  }
}

// Another thread's, meanwhile. The copy engine knows nothing of these barriers, so SetUp is all
// that whoever uses them waits for.
template <int kTokens>
__device__ __forceinline__ void InitOtherBarriers(const Params& p, Shared<kTokens>& shared) {
  Fixed<kTokens>& fixed = shared.fixed;
#pragma unroll
  for (int s = 0; s < kMaxCodeSlots; ++s) {
    BarrierInit(&fixed.unpacked[s], kTokenWarps);
    BarrierInit(&fixed.empty[s], p.row_groups * (kWarpgroup / kWarp));
  }
}

// The token warps' part: unpacks a's nibbles, a step after the other, and fills stages anew.
template <int kTokens>
__device__ __forceinline__ void UnpackTokens(const Params& p, const CUtensorMap& a_map,
                                             const CUtensorMap& b_map, const Work& work, int warp,
                                             Shared<kTokens>& shared) {
  Fixed<kTokens>& fixed = shared.fixed;
  // A warp takes a segment of eight rows at a time, its lane chunk lane / 8 of row lane % 8, so
  // that eight lanes load and store in all banks.
  static_assert(kSwizzleRows * kSegmentChunks == kWarp && kTokenWarps % kSegments == 0);
  constexpr int kOctets = kTokens / kSwizzleRows;
  constexpr int kWarpOctets = kTokenWarps / kSegments;  // that the warps take together
  constexpr int kLoads = (kOctets + kWarpOctets - 1) / kWarpOctets;
  const int lane = threadIdx.x % kWarp;
  const int segment = warp % kSegments, octet = warp / kSegments;
  const int row = lane % kSwizzleRows, chunk = lane / kSwizzleRows;
  // Exclusive or with a multiple of 16 moves along the swizzled row.
  const uint32_t place = SharedAddress(shared.rings) + (octet * kSwizzleRows + row) * kSwizzleRow;
  const uint32_t from = place + p.code_slots * kTokenCodes<kTokens> +
                        (row ^ (segment * kSegmentChunks + chunk)) * kChunk;
  const uint32_t even = place + segment * kTokens * kSwizzleRow + (row ^ 2 * chunk) * kChunk;
  const uint32_t odd = even ^ kChunk;
  constexpr int kPitch = kWarpOctets * kSwizzleRows * kSwizzleRow;
  int slot = 0, parity = 0, stage = 0, stage_parity = 0, refill_slot = 0;
  for (int step = 0; step < work.steps; ++step) {
    BarrierWait(&fixed.a_full[stage], stage_parity);
    uint4 nibbles[kLoads];
    if (octet < kOctets) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        nibbles[i] = LoadShared(from + stage * p.stage_bytes + i * kPitch);
      }
    }
    if (step >= p.code_slots) {
      // The step that had these codes is done with, and with it its stage.
      BarrierWait(&fixed.empty[slot], parity ^ 1);
      const int refill = step - p.code_slots + p.stages;
      if (warp == 0 && lane == 0 && refill < work.steps) {
        CopyStep(p, a_map, b_map, work, refill, refill_slot, shared);
      }
      if (++refill_slot == p.stages) refill_slot = 0;
    }
    if (octet < kOctets) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint4 v = nibbles[i];
        const int to = slot * kTokenCodes<kTokens> + i * kPitch;
        StoreShared(even + to, {EvenCodes(v.x), EvenCodes(v.y), EvenCodes(v.z), EvenCodes(v.w)});
        StoreShared(odd + to, {OddCodes(v.x), OddCodes(v.y), OddCodes(v.z), OddCodes(v.w)});
      }
    }
    FenceAsyncProxy();
    __syncwarp();
    if (lane == 0) BarrierArrive(&fixed.unpacked[slot]);
    if (++stage == p.stages) {
      stage = 0;
      stage_parity ^= 1;
    }
    if (++slot == p.code_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void Multiply(const Params& p, const Work& work, int row_group,
                                         int sharer, Shared<kTokens>& shared,
                                         float (&sums)[kTokens / 2]) {
  Fixed<kTokens>& fixed = shared.fixed;
  const int lane = threadIdx.x % kWarp;
  // Of the four matrices that are loaded at once, two lie below each other and two side by side.
  // Past the tile's last row it is taken again, for sums that are not stored.
  const int row =
      min(row_group * kWgmmaRows + threadIdx.x % kWarpgroup / kWarp * 16 + lane % 16, p.rows - 1);
  const uint32_t place = SharedAddress(shared.rings) + p.code_slots * kTokenCodes<kTokens> +
                         kTokenNibbles<kTokens> + row * kStageRowBytes +
                         (lane / 16 ^ row % kSwizzleRows) * kChunk;
  const uint64_t first_tokens = WgmmaDescriptor(shared.rings);
#pragma unroll
  for (float& sum : sums) sum = 0;
  // Of two pairs of chunks, by turns: one is unpacked while the other is multiplied.
  constexpr int kPairs = kStageChunks / 2;
  uint32_t codes[2][2][4];
  int stage = sharer, stage_parity = 0, slot = sharer, parity = 0, last_slot = 0;
  for (int step = sharer; step < work.steps; step += p.sharers) {
    BarrierWait(&fixed.b_full[stage], stage_parity);
    const uint32_t from = place + stage * p.stage_bytes;
    uint32_t words[4];
    LoadMatrices(from, words);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      Unpack(words, codes[pair % 2]);
      if (pair + 1 < kPairs) LoadMatrices(from ^ (pair + 1) * 2 * kChunk, words);
      if (pair == 0) BarrierWait(&fixed.unpacked[slot], parity);
      constexpr int kSegmentPairs = kPairs / kSegments;
      const int at = slot * kTokenCodes<kTokens> + pair / kSegmentPairs * kTokens * kSwizzleRow +
                     pair % kSegmentPairs * 2 * kWgmmaK;
      const uint64_t tokens = first_tokens + (at >> 4);
      WgmmaFence();
#pragma unroll
      for (int i = 0; i < 2; ++i) Wgmma(sums, codes[pair % 2][i], tokens + (i * kWgmmaK >> 4));
      WgmmaCommit();
      // The pair before this one is done with, and with the first the step before this one.
      WgmmaWait<1>();
      if (pair == 0 && step != sharer && lane == 0) BarrierArrive(&fixed.empty[last_slot]);
    }
    stage += p.sharers;
    if (stage >= p.stages) {
      stage -= p.stages;
      stage_parity ^= 1;
    }
    last_slot = slot;
    slot += p.sharers;
    if (slot >= p.code_slots) {
      slot -= p.code_slots;
      parity ^= 1;
    }
  }
  WgmmaWait<0>();
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    PackedGemmKernel(const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map, const __grid_constant__ Params p) {
  extern __shared__ __align__(kAlignment) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(memory);
  const Work work = BlockWork<kTokens>(p);
  // From the first lane, so that the compiler sees that it is the same in all.
  const int warp = __shfl_sync(~0u, threadIdx.x / kWarp, 0);
  if (warp >= kConsumerWarps) {
    if (threadIdx.x == kConsumerThreads) StartCopies(p, a_map, b_map, work, shared);
    if (threadIdx.x == kConsumerThreads + kWarp) InitOtherBarriers(p, shared);
    __syncwarp();
    SetUp();
    UnpackTokens(p, a_map, b_map, work, warp - kConsumerWarps, shared);
    ClusterSync();
  } else {
    const Factors<kTokens> factors(p, work);
    SetUp();
    const int warpgroup = warp / (kWarpgroup / kWarp);
    static_assert(kMaxSharers == 2);
    const int sharer = (warpgroup >= p.row_groups) + (warpgroup >= 2 * p.row_groups);
    float sums[kTokens / 2];
    if (sharer < p.sharers) {
      Multiply(p, work, warpgroup - sharer * p.row_groups, sharer, shared, sums);
    }
    // The sums overwrite stages: all warpgroups must have used theirs up.
    NamedBarrier(1, kConsumerThreads);
    factors.Share(p, shared.fixed);
    const int row_group = warpgroup - sharer * p.row_groups;
    const auto finish = [&](auto parts) {
      Finish<kTokens, decltype(parts)::value>(p, work, row_group, sharer, sums, shared);
    };
    switch (p.split * p.sharers) {
      case 1:
        finish(std::integral_constant<int, 1>());
        break;
      case 2:
        finish(std::integral_constant<int, 2>());
        break;
      case 4:
        finish(std::integral_constant<int, 4>());
        break;
      case 8:
        finish(std::integral_constant<int, 8>());
        break;
      default:
        finish(std::integral_constant<int, kMaxSplit * kMaxSharers>());
    }
  }
  // No block leaves while another may still read its sums.
  if (p.split > 1) {
    __syncwarp();
    ClusterMeet();
  }
}

// How many clusters of so many blocks run at once.
template <int kTokens>
cudaError_t ClustersOf(int split, int* clusters) {
  cudaLaunchAttribute cluster = ClusterOf(split);
  cudaLaunchConfig_t config{};
  config.gridDim = split;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = sizeof(Shared<kTokens>);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return ClustersAtOnce(reinterpret_cast<const void*>(&PackedGemmKernel<kTokens>), config,
                        clusters);
}

// How y is divided: rows of b a tile, and blocks that share a tile's k.
struct Plan {
  int rows, split;
};

// Microseconds that a multiprocessor takes for a block, fitted to products of every split of 1, 16
// and 64 tokens on a GPU that reads 3.0 TB/s. With 1.4 times that, bytes of b cost less, and since
// then the rings have changed: of the 24 products of benchmarks/gemm.py there is none whose choice
// is over 3 % slower than the best.
template <int kTokens>
double BlockCost(int64_t steps, int64_t rows, int split) {
  constexpr double kBlock = 4.4;         // launch, the first bytes' way, the last step, the end
  constexpr double kByteOfB = 26e-6;     // of nibbles, from memory
  constexpr double kByteOfA = 28.4e-6;   // of nibbles, from L2, and to be unpacked
  constexpr double kGroup = 96e-3;       // a step of a wgmma's rows, however few of them count
  constexpr double kExchange = 33.7e-6;  // a byte of sums that other blocks have or want
  const double step =
      kStageRowBytes * (kByteOfB * rows + kByteOfA * kTokens) + kGroup * CeilDiv(rows, kWgmmaRows);
  return kBlock + steps * step + kExchange * sizeof(float) * rows * kTokens * (split - 1) / split;
}

// The plan that is done first.
template <int kTokens>
cudaError_t Choose(const PackedGemm& g, Plan* best) {
  const int64_t bands = g.batch * CeilDiv(g.m, kTokens);
  const int64_t stages = CeilDiv(g.k, kStageK);
  *best = {kMaxRows, 1};
  double least = 1e300;
  for (int split = 1; split <= std::min<int64_t>(kMaxSplit, stages); split *= 2) {
    int clusters;
    const cudaError_t status = ClustersOf<kTokens>(split, &clusters);
    if (status != cudaSuccess) return status;
    if (clusters == 0) continue;
    const int64_t waves = CeilDiv(bands * CeilDiv(g.n, kMaxRows), clusters);
    const int64_t n_tiles = std::max<int64_t>(1, clusters * waves / bands);
    const int64_t rows = CeilDiv(CeilDiv(g.n, n_tiles), kSwizzleRows) * kSwizzleRows;
    if (rows > kMaxRows) continue;
    const double cost = waves * BlockCost<kTokens>(CeilDiv(stages, split), rows, split);
    if (cost < least) {
      least = cost;
      *best = {static_cast<int>(rows), split};
    }
  }
  return cudaSuccess;
}

// How the rings divide shared memory.
struct Rings {
  int code_slots, stages, stage_bytes;
};

// A stage is filled anew when the codes of its step are used up, for a step that comes after those
// that have codes. So there must be more stages than code slots, or that step would never come, and
// there had better be two turns more.
template <int kTokens>
constexpr Rings Divide(int rows, int sharers) {
  const int b_bytes = rows * kStageRowBytes, stage_bytes = kTokenNibbles<kTokens> + b_bytes;
  for (int turns = kMaxTurns;; --turns) {
    const int code_slots = turns * sharers;
    const int fitting = (kRingBytes<kTokens> - code_slots * kTokenCodes<kTokens>) / stage_bytes;
    const int wanted = std::max(code_slots + 2 * sharers, kBytesAhead / b_bytes);
    const int stages = std::min({fitting, wanted, kMaxStages}) / sharers * sharers;
    if (stages > code_slots || turns == kMinTurns) return {code_slots, stages, stage_bytes};
  }
}

// Whether there are for the largest tile with so many sharers, and so for all.
template <int kTokens, int kSharers>
constexpr bool kFits = Divide<kTokens>(kMaxRows / kSharers, kSharers).stages >
                       Divide<kTokens>(kMaxRows / kSharers, kSharers).code_slots;

template <int kTokens>
cudaError_t Launch(const PackedGemm& g, cudaStream_t stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit);
  static_assert(kFits<kTokens, 1> && kFits<kTokens, kMaxSharers>);
  static_assert(sizeof(Shared<kTokens>::sums) <= kRingBytes<kTokens>);
  static_assert(kTokens % kSwizzleRows == 0);
  cudaError_t status =
      cudaFuncSetAttribute(PackedGemmKernel<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           sizeof(Shared<kTokens>));
  if (status != cudaSuccess) return status;
  Plan plan;
  status = Choose<kTokens>(g, &plan);
  if (status != cudaSuccess) return status;
  CUtensorMap a_map{}, b_map{};
  if (g.k != 0) {
    status = MakeTensorMap(&a_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.a, g.batch, g.m, g.k / 2,
                           kTokens, kStageRowBytes, CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
    // L2 fetches a step's share of a row: with the next one's as well, the first comes no sooner
    // than the second.
    status = MakeTensorMap(&b_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.b, g.batch, g.n, g.k / 2,
                           plan.rows, kStageRowBytes, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
    if (status != cudaSuccess) return status;
  }
  const int64_t m_tiles = CeilDiv(g.m, kTokens), n_tiles = CeilDiv(g.n, plan.rows);
  const int row_groups = static_cast<int>(CeilDiv(plan.rows, kWgmmaRows));
  const int sharers = std::min(kMaxSharers, kConsumers / row_groups);
  const Rings rings = Divide<kTokens>(plan.rows, sharers);
  const int width = ElementBytes(g.out_type);
  const int64_t stages = CeilDiv(g.k, kStageK);
  const Params p{static_cast<int>(g.batch),
                 static_cast<int>(g.m),
                 static_cast<int>(g.n),
                 static_cast<int>(m_tiles),
                 static_cast<int>(n_tiles),
                 plan.rows,
                 row_groups,
                 sharers,
                 rings.code_slots,
                 rings.stages,
                 rings.stage_bytes,
                 plan.split,
                 static_cast<int>(stages / plan.split),
                 static_cast<int>(stages % plan.split),
                 g.a_scale,
                 g.b_scale,
                 g.a_scale_size != 1,
                 g.b_scale_size != 1,
                 g.bias,
                 g.y,
                 g.out_type,
                 g.n % 2 == 0 && reinterpret_cast<uintptr_t>(g.y) % (2 * width) == 0};
  cudaLaunchAttribute cluster = ClusterOf(plan.split);
  cudaLaunchConfig_t config{};
  const int64_t blocks = g.batch * m_tiles * n_tiles * plan.split;
  if (blocks > kMaxSize) return cudaErrorInvalidConfiguration;
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = sizeof(Shared<kTokens>);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, PackedGemmKernel<kTokens>, a_map, b_map, p);
}

}  // namespace

cudaError_t LaunchPackedGemm(const PackedGemm& g, cudaStream_t stream) {
  if (g.batch == 0 || g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.k % kChunkK != 0) return cudaErrorInvalidValue;
  if (std::max({g.batch, g.m, g.n, g.k}) > kMaxSize) return cudaErrorInvalidValue;
  if (g.m <= 8) return Launch<8>(g, stream);
  if (g.m <= 16) return Launch<16>(g, stream);
  if (g.m <= 32) return Launch<32>(g, stream);
  return Launch<64>(g, stream);
}

}  // namespace jfp4
