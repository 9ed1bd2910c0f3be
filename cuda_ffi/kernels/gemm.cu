// One persistent block an SM, in clusters of two. A cluster computes 256 rows of y by one tile's
// columns: each block 128 of the rows, both the same columns, so that each loads half of b's tile
// and sends it to both. One warp feeds a ring of shared-memory stages through the copy engine. Two
// warpgroups multiply, by turns, a tile each: while one writes its tile, through shared memory, the
// other has the tensor cores to itself. Promotion needs a second set of accumulators, so there they
// share a tile.
//
// What bounds the rate, beside power, is what L2 delivers: so tiles are wide, the clusters at work
// read few columns of b and the same rows of a at about the same time, and each takes its next tile
// when it is about to begin it, since those that are nearer to L2 are faster.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda_ffi/kernels/gemm.h"
#include "cuda_ffi/kernels/gemm_epilogue.cuh"
#include "cuda_ffi/kernels/gemm_tile.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/wgmma.cuh"

namespace jfp4 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kWgmmaK = 32;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);

// Steps along k before the end of a tile when those who load ask for the next: late, for the longer
// before it begins a tile is given away, the less is known of who has time for it; but not so late
// that they would have to wait.
constexpr int kAskAhead = 8;

constexpr int kAlignment = 1024;  // of a 128-byte-swizzled tile

template <int kBlockN>
struct Stage {
  uint8_t a[kBlockM * kBlockK];
  uint8_t b[kBlockN * kBlockK];
};

// As many stages as fit.
template <int kBlockN>
constexpr int kStages = kBlockN == kNarrow  ? 6
                        : kBlockN == kJoint ? 4
                                            : 5;

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
  uint64_t asked;                   // for the next tile; of the first block's, for both
};
template <int kBlockN>
constexpr int kSharedBytes = sizeof(Shared<kBlockN>) + kAlignment;
static_assert(std::max({kSharedBytes<kNarrow>, kSharedBytes<kMedium>, kSharedBytes<kWide>,
                        kSharedBytes<kJoint>}) <= 227 * 1024);

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

// A warpgroup's share of the tiles, and of a tile: every second one whole, or half of every one.
template <int kBlockN, bool kPromote>
constexpr int kTurns = kPromote || kBlockN == kJoint ? 1 : kConsumers;

constexpr int kWarps = kWarpgroup / kWarp;

// Where a warpgroup is in its work.
template <int kBlockN>
struct Progress {
  Ring<kStages<kBlockN>> ring;
  // A warpgroup begins a tile when the other has seen all of the tile before arrive. Only then do
  // the parities of the full stages tell the phase it waits for from the one before the last.
  // Every warp says so for itself, or one that is late could miss two turns, which look like
  // none.
  int turn_parity;
};

// A tile of kCols columns, by the warpgroup that has it, or shares it. The sums are the caller's:
// of an array in here the compiler would keep a second copy.
template <int kCols, bool kAE5M2, bool kBE5M2, bool kPromote, bool kSlope, int kBlockN, int kHalves>
__device__ __forceinline__ void Compute(const Params& p, const CUtensorMap& y_map,
                                        Shared<kBlockN>& shared, const Tile& tile, int warpgroup,
                                        int k_blocks, Progress<kBlockN>& progress,
                                        Sums<kBlockN> (&sums)[kHalves]) {
  constexpr int kTurns = jfp4::kTurns<kBlockN, kPromote>;
  const int lane = threadIdx.x % kWarp;
  const int block_row = kTurns == 1 ? warpgroup * kWgmmaM : 0;
  Ring<kStages<kBlockN>>& ring = progress.ring;
  auto release = [&](int stage) {
    if (lane < kCluster) BarrierArriveRemote(&shared.empty[stage], lane);
  };
  if constexpr (kSlope) PrefetchSlope(p, tile);
  if constexpr (kPromote) {
#pragma unroll
    for (float& sum : sums[0]) sum = 0;
  }
  if constexpr (kTurns > 1) {
    BarrierWait(&shared.turn[warpgroup], progress.turn_parity);
    progress.turn_parity ^= 1;
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
      Wgmma<kCols, kAE5M2, kBE5M2>(to, a + along_k + along_m, b + along_k, accumulate);
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
      if (kb == k_blocks - 1 && lane == 0) BarrierArrive(&shared.turn[kTurns - 1 - warpgroup]);
    }
    if constexpr (kPromote) {
      WgmmaWait<0>();
      release(ring.stage);
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) sums[0][i] += partial[i];
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
  const int row = tile.row + block_row + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  const int col = tile.col + 2 * (lane % 4);
  Finish<kCols>(p, tile.batch, row, col, sums);
  // Its registers would be every other product's too.
  if constexpr (kSlope) MultiplyBySlope<kCols>(p, tile.batch, row, col, sums);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    Store<kCols>(p, y_map, shared.store[warpgroup], 1 + warpgroup, tile,
                 tile.row + block_row + half * kWgmmaM, sums[half]);
  }
}

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote, bool kSlope>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    GemmKernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
               const __grid_constant__ CUtensorMap narrow_map,
               const __grid_constant__ CUtensorMap y_map, const Params p) {
  constexpr int kTurns = jfp4::kTurns<kBlockN, kPromote>;
  constexpr int kHalves = kTurns == 1 ? 1 : kBlockM / kWgmmaM;
  constexpr int kSharers = kConsumers / kTurns;  // warpgroups of a tile

  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kBlockN>*>(
      (reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) / kAlignment * kAlignment);
  // Broadcast, so that the compiler keeps in uniform registers what follows from it.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0);
  const int k_blocks = (p.k + kBlockK - 1) / kBlockK;
  const Schedule<kBlockN> schedule(p.batch, p.m, p.n, p.full_cols);
  const int cluster = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages<kBlockN>; ++s) {
      BarrierInit(&shared.full[s], 1);
      // Every warp that reads a stage, in both blocks, since each block writes into the other's.
      BarrierInit(&shared.empty[s], kCluster * kSharers * kWarps);
    }
    for (int w = 0; w < kConsumers; ++w) {
      BarrierInit(&shared.turn[w], kWarps);
      BarrierInit(&shared.next_full[w], 1);
      BarrierExpect(&shared.next_full[w], sizeof(uint32_t));
      BarrierInit(&shared.next_empty[w], kCluster * kSharers * kWarps);
    }
    BarrierInit(&shared.asked, kCluster);
    FenceBarrierInit();
  }
  if (threadIdx.x == kConsumers * kWarpgroup) {
    PrefetchTensorMap(&a_map);
    PrefetchTensorMap(&b_map);
  }
  ClusterSync();

  // The index of this cluster's tile number `turn`, once it is known; past the last one's it ends.
  const int lane = threadIdx.x % kWarp;
  auto next_tile = [&](int turn) {
    const int slot = turn % kConsumers;
    BarrierWait(&shared.next_full[slot], turn / kConsumers & 1);
    const int index = LoadShared(&shared.next[slot]);
    __syncwarp();  // all lanes have read
    return index;
  };

  if (warpgroup == kConsumers) {
    RegistersDecrease<kProducerRegisters>();
    const int warp = threadIdx.x % kWarpgroup / kWarp;
    if (warp == 0) {
      Ring<kStages<kBlockN>> ring;
      for (int turn = 0;; ++turn) {
        const int index = next_tile(turn);
        if (index >= schedule.total) break;
        if (lane == 0) {
          // For the turn after the next, for which it asks in the next.
          BarrierExpect(&shared.next_full[turn % kConsumers], sizeof(uint32_t));
          const int ask = max(0, k_blocks - kAskAhead);
          const Tile tile = schedule[index];
          const int part = ClusterRank() * (tile.cols / kCluster);
          const CUtensorMap* map = tile.cols == kBlockN ? &b_map : &narrow_map;
          for (int kb = 0; kb < k_blocks; ++kb, ++ring) {
            if (kb == ask) BarrierArriveRemote(&shared.asked, 0);
            Stage<kBlockN>& stage = shared.stages[ring.stage];
            uint64_t* full = &shared.full[ring.stage];
            BarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
            BarrierExpect(full, (kBlockM + tile.cols) * kBlockK);
            TensorLoad(stage.a, &a_map, full, kb * kBlockK, tile.row, tile.batch);
            TensorLoadMulticast(stage.b + part * kBlockK, map, full, (1 << kCluster) - 1,
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
        if (turn > 0 && index < schedule.total) {
          BarrierWait(&shared.asked, (turn & 1) ^ 1);
          // The tiles after the first ones, and past the end one for each cluster.
          index = schedule.total == clusters
                      ? schedule.total
                      : clusters + static_cast<int>(TakeNumber(p.counter, schedule.total - 1));
        }
        if (index >= schedule.total) ++ends;
        const int slot = turn % kConsumers;
        BarrierWait(&shared.next_empty[slot], (turn / kConsumers & 1) ^ 1);
        for (int rank = 0; rank < kCluster; ++rank) {
          StoreRemote(&shared.next[slot], index, &shared.next_full[slot], rank);
        }
      }
    }
  } else {
    RegistersIncrease<kConsumerRegisters>();
    const int first = kTurns == 1 ? 0 : warpgroup;  // of the tiles that it takes
    Progress<kBlockN> progress{{}, first == 0};
    progress.ring.Advance(first * k_blocks);
    for (int turn = first;; turn += kTurns) {
      const int index = next_tile(turn);
      // An arrival does not wait for a load before it, so giving the place up is made to depend on
      // what was read, which is never negative. Whoever loads has used its tile when it asks.
      if (lane == 0 && index >= 0) BarrierArriveRemote(&shared.next_empty[turn % kConsumers], 0);
      if (index >= schedule.total) break;
      const Tile tile = schedule[index];
      Sums<kBlockN> sums[kHalves];
      if constexpr (kBlockN == kWide) {
        if (tile.cols == kNarrow) {
          Compute<kNarrow, kAE5M2, kBE5M2, kPromote, kSlope>(p, y_map, shared, tile, warpgroup,
                                                             k_blocks, progress, sums);
          continue;
        }
      }
      Compute<kBlockN, kAE5M2, kBE5M2, kPromote, kSlope>(p, y_map, shared, tile, warpgroup,
                                                         k_blocks, progress, sums);
    }
    if (threadIdx.x % kWarpgroup == 0) TensorStoreWaitRead<0>();
  }
  // No block leaves while the other may still write into its shared memory.
  __syncwarp();
  ClusterSync();
}

// Whether y's rows are multiples of 16 bytes, as the copy engine wants them.
bool HasBulkRows(const Gemm& g) {
  return g.n * ElementBytes(g.out_type) % 16 == 0 && reinterpret_cast<uintptr_t>(g.y) % 16 == 0;
}

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote, bool kSlope>
cudaError_t Launch(const Gemm& g, int full_cols, int clusters, cudaStream_t stream) {
  const int tiles = Schedule<kBlockN>(g.batch, g.m, g.n, full_cols).total;
  const Params p{static_cast<int>(g.batch),
                 static_cast<int>(g.m),
                 static_cast<int>(g.n),
                 static_cast<int>(g.k),
                 full_cols,
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
                 g.counter,
                 HasBulkRows(g)};
  CUtensorMap a_map, b_map, narrow_map, y_map{};
  cudaError_t status = MakeTensorMap(&a_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.a, g.batch, g.m,
                                     g.k, kBlockM, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B);
  if (status != cudaSuccess) return status;
  for (auto [map, cols] : {std::pair(&b_map, kBlockN), std::pair(&narrow_map, kNarrow)}) {
    status = MakeTensorMap(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.b, g.batch, g.n, g.k,
                           cols / kCluster, kBlockK, CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
  }
  if (p.bulk_store) {
    const CUtensorMapDataType type = g.out_type == DType::kBF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                     : g.out_type == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    const int bytes = ElementBytes(g.out_type);
    status = MakeTensorMap(&y_map, type, bytes, g.y, g.batch, g.m, g.n, kWgmmaM, 128 / bytes,
                           CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
  }
  auto kernel = GemmKernel<kBlockN, kAE5M2, kBE5M2, kPromote, kSlope>;
  constexpr int kBytes = kSharedBytes<kBlockN>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  clusters = std::min(clusters, tiles);
  cudaLaunchConfig_t config{};
  config.gridDim = clusters * kCluster;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, a_map, b_map, narrow_map, y_map, p);
}

bool HasSlope(const Gemm& g) { return g.slope.w != nullptr; }

// A way to divide y into tiles, and about how long the product then takes, in columns of a wide
// tile.
struct Tiling {
  float cost;
  int width, full_cols;

  bool operator<(const Tiling& other) const { return cost < other.cost; }
};

// When the last of the clusters ends, if each takes the next tile as soon as it has done one: first
// those of the kernel's width, then the narrow ones.
float Makespan(int clusters, int full, float full_cost, int narrow, float narrow_cost) {
  // Some have one of the first kind more than the others.
  const int more = full % clusters, others = clusters - more;
  float end = full / clusters * full_cost;
  float end_of_more = more > 0 ? end + full_cost : end;
  for (; narrow > 0 && end < end_of_more; narrow -= others) end += narrow_cost;
  if (narrow <= 0) return std::max(end, end_of_more);
  // The others have caught up: all take as many, and of the rest those that are behind the first.
  const float rounds = narrow / clusters * narrow_cost;
  const int left = narrow % clusters;
  end += rounds + (left > more ? narrow_cost : 0);
  end_of_more += rounds + (left > 0 ? narrow_cost : 0);
  return std::max(end, end_of_more);
}

// The first full_cols columns of tiles are of width kBlockN, the others narrow. What a column costs
// was fitted to times of an H200 both in bursts, where joint tiles are level with wide ones if k is
// long, and at its power limit, where they lose. What all clusters compute counts beside the
// longest time, for power that is not used by some is there for the rest.
template <int kBlockN>
Tiling Divide(const Gemm& g, int clusters, int full_cols) {
  const float column = kBlockN == kNarrow   ? 1.025f
                       : kBlockN == kMedium ? 1.015f
                       : kBlockN == kWide   ? 1.0f
                                            : 0.985f + 300.0f / g.k;  // its epilogue shows
  constexpr float kNarrowColumn = 1.06f;                              // that reads a again
  constexpr float kOfAll = 1.0f / 3;
  const Schedule<kBlockN> schedule(g.batch, g.m, g.n, full_cols);
  const int full = schedule.full, narrow = schedule.total - full;
  const float full_cost = kBlockN * column, narrow_cost = kNarrow * kNarrowColumn;
  const float mean = (full * full_cost + narrow * narrow_cost) / clusters;
  return {Makespan(clusters, full, full_cost, narrow, narrow_cost) + kOfAll * mean, kBlockN,
          full_cols};
}

template <int kBlockN>
Tiling Uniform(const Gemm& g, int clusters) {
  return Divide<kBlockN>(g, clusters, static_cast<int>(CeilDiv(g.n, kBlockN)));
}

Tiling Choose(const Gemm& g, int clusters) {
  const Tiling narrow = Uniform<kNarrow>(g, clusters);
  // The slope's registers leave none for more sums.
  if (g.promote || HasSlope(g) || !HasBulkRows(g)) return narrow;
  Tiling best = std::min({narrow, Uniform<kMedium>(g, clusters), Uniform<kWide>(g, clusters),
                          Uniform<kJoint>(g, clusters)});
  for (int cols = 1; cols <= g.n / kWide; ++cols) {
    best = std::min(best, Divide<kWide>(g, clusters, cols));
  }
  return best;
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
  const Tiling tiling = Choose(g, clusters);
  auto launch = [&](auto block_n, auto promote, auto slope) {
    constexpr int kBlockN = block_n();
    constexpr bool kPromote = promote(), kSlope = slope();
    auto of_types = g.a_e5m2   ? Launch<kBlockN, true, false, kPromote, kSlope>
                    : g.b_e5m2 ? Launch<kBlockN, false, true, kPromote, kSlope>
                               : Launch<kBlockN, false, false, kPromote, kSlope>;
    return of_types(g, tiling.full_cols, clusters, stream);
  };
  using No = std::false_type;
  using Yes = std::true_type;
  const std::integral_constant<int, kNarrow> narrow;
  const std::integral_constant<int, kMedium> medium;
  const std::integral_constant<int, kWide> wide;
  const std::integral_constant<int, kJoint> joint;
  if (g.promote) return HasSlope(g) ? launch(narrow, Yes(), Yes()) : launch(narrow, Yes(), No());
  if (HasSlope(g)) return launch(narrow, No(), Yes());
  switch (tiling.width) {
    case kMedium:
      return launch(medium, No(), No());
    case kWide:
      return launch(wide, No(), No());
    case kJoint:
      return launch(joint, No(), No());
  }
  return launch(narrow, No(), No());
}

}  // namespace jfp4
