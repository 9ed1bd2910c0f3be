// One persistent block an SM, in clusters of two. A cluster computes 256 x kBlockN of y: each block
// 128 rows of it, both the same columns, so that each loads half of b's tile and sends it to both.
// One warp feeds a ring of shared-memory stages through the copy engine; two warpgroups multiply 64
// rows each and write them through shared memory, while the ring fills for the next tile.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "cuda_ffi/kernels/gemm.h"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/wgmma.cuh"

namespace jfp4 {
namespace {

constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kBlockM = 64 * kConsumers;
constexpr int kBlockK = 128;  // bytes, one swizzle row
constexpr int kWgmmaK = 32;
constexpr int kThreads = kWarpgroup * (kConsumers + 1);
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);

// The store goes in boxes of 64 rows of 128 bytes, two of them in flight a warpgroup.
constexpr int kStoreBytes = 64 * 128;
constexpr int kStoreBuffers = 2;

constexpr int kSharedLimit = 227 * 1024;
constexpr int kAlignment = 1024;  // of a 128-byte-swizzled tile

// Rows of clusters that are walked together, so that the blocks at work share both operands in L2.
constexpr int kRasterRows = 8;

template <int kBlockN>
struct Stage {
  uint8_t a[kBlockM * kBlockK];
  uint8_t b[kBlockN * kBlockK];
};

constexpr int kFixedBytes = kConsumers * kStoreBuffers * kStoreBytes + kAlignment + 256;

template <int kBlockN>
constexpr int kStages = (kSharedLimit - kFixedBytes) / static_cast<int>(sizeof(Stage<kBlockN>));

template <int kBlockN>
struct Shared {
  Stage<kBlockN> stages[kStages<kBlockN>];
  uint8_t store[kConsumers][kStoreBuffers][kStoreBytes];
  uint64_t full[kStages<kBlockN>];
  uint64_t empty[kStages<kBlockN>];
};

struct Params {
  int batch, m, n, k;
  const float* a_scale;
  const float* b_scale;
  int64_t a_scale_size, b_scale_size;
  const float* u;
  const float* v;
  int rank;
  const float* bias;
  void* y;
  DType out_type;
  bool bulk_store;  // whether y's rows are multiples of 16 bytes, as the copy engine wants them
};

struct Tile {
  int batch, row, col;  // row and col in elements, of this block
};

template <int kBlockN>
struct Schedule {
  int rows, cols, total;  // in clusters

  __host__ __device__ Schedule(int batch, int m, int n)
      : rows((m + kCluster * kBlockM - 1) / (kCluster * kBlockM)),
        cols((n + kBlockN - 1) / kBlockN),
        total(batch * rows * cols) {}

  __device__ Tile operator[](int index) const {
    const int batch = index / (rows * cols);
    index -= batch * rows * cols;
    const int band = index / (kRasterRows * cols);
    const int band_rows = min(kRasterRows, rows - band * kRasterRows);
    index -= band * kRasterRows * cols;
    const int row = band * kRasterRows + index % band_rows;
    return {batch, (row * kCluster + static_cast<int>(ClusterRank())) * kBlockM,
            index / band_rows * kBlockN};
  }
};

// The place in y that a thread's accumulators have: register 4 j + 2 h + c is row rows[h] and
// column col + 8 j + c. Places past an edge are read as the last one and never stored.
struct Place {
  int64_t rows[2];  // over the whole batch
  int col;
};

// Scales, rank terms and bias, in FP32 and in this order.
template <int kRegisters>
__device__ __forceinline__ void Finish(const Params& p, int batch, const Place& place,
                                       float (&y)[kRegisters]) {
  const float* b_scale = p.b_scale + (p.b_scale_size == 1 ? batch : int64_t{batch} * p.n);
  float a_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    a_scale[h] = p.a_scale[p.a_scale_size == 1 ? batch : place.rows[h]];
  }
  const int every_column = p.b_scale_size == 1 ? 0 : -1;
  int first_col = place.col;
  auto column = [&](int i) {
    // Keeps the compiler from computing all columns, or loading all their numbers, ahead of use:
    // the registers would not hold them beside the sums.
    if (i % 32 == 0) asm volatile("" : "+r"(first_col)::"memory");
    return min(first_col + i / 4 * 8 + i % 2, p.n - 1);
  };
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    const float scale = b_scale[column(i) & every_column];
    y[i] = __fmul_rn(__fmul_rn(y[i], a_scale[i / 2 % 2]), scale);
  }
  // The bias is one more rank term, whose column is ones.
  const int terms = p.rank + (p.bias != nullptr);
  for (int r = 0; r < terms; ++r) {
    float u[2] = {1, 1};
    const float* v = p.bias + int64_t{batch} * p.n;
    if (r < p.rank) {
      u[0] = p.u[place.rows[0] * p.rank + r];
      u[1] = p.u[place.rows[1] * p.rank + r];
      v = p.v + (int64_t{batch} * p.rank + r) * p.n;
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      y[i] = __fadd_rn(y[i], __fmul_rn(u[i / 2 % 2], v[column(i)]));
    }
  }
}

__device__ __forceinline__ void Cast(float first, float second, float2* out) {
  *out = make_float2(first, second);
}
__device__ __forceinline__ void Cast(float first, float second, __nv_bfloat162* out) {
  *out = __floats2bfloat162_rn(first, second);
}
__device__ __forceinline__ void Cast(float first, float second, __half2* out) {
  *out = __floats2half2_rn(first, second);
}

// Writes one warpgroup's 64 rows of a tile, in boxes of 128 bytes a row.
template <int kBlockN, typename Pair>
__device__ __forceinline__ void Store(const Params& p, const CUtensorMap& y_map,
                                      uint8_t (&buffers)[kStoreBuffers][kStoreBytes], int warpgroup,
                                      Tile tile, const float (&y)[kBlockN / 2]) {
  constexpr int kElementBytes = sizeof(Pair) / 2;
  constexpr int kBoxCols = 128 / kElementBytes;
  static_assert(kBlockN % kBoxCols == 0 && kBoxCols % 8 == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
  const int first_row = tile.row + 64 * warpgroup;
#pragma unroll
  for (int box = 0; box < kBlockN / kBoxCols; ++box) {
    uint8_t* buffer = buffers[box % kStoreBuffers];
    if (thread == 0) TensorStoreWaitRead<kStoreBuffers - 1>();
    NamedBarrier(1 + warpgroup, kWarpgroup);
    // The copy engine's 128-byte swizzle: it also spreads a warp's writes over all banks.
    auto at = [&](int row, int byte) {
      return buffer + row * 128 + ((byte / 16 ^ row % 8) * 16 + byte % 16);
    };
#pragma unroll
    for (int j = 0; j < kBoxCols / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = (box * kBoxCols / 8 + j) * 4 + 2 * h;
        const int row = thread / kWarp * 16 + lane / 4 + 8 * h;
        Pair* out = reinterpret_cast<Pair*>(at(row, (8 * j + 2 * (lane % 4)) * kElementBytes));
        Cast(y[i], y[i + 1], out);
      }
    }
    const int first_col = tile.col + box * kBoxCols;
    if (p.bulk_store) {
      FenceAsyncProxy();
      NamedBarrier(1 + warpgroup, kWarpgroup);
      if (thread == 0) {
        TensorStore(&y_map, buffer, first_col, first_row, tile.batch);
        TensorStoreCommit();
      }
    } else {
      // Rows that the copy engine cannot address go out an element at a time.
      using Element = std::conditional_t<kElementBytes == 4, uint32_t, uint16_t>;
      NamedBarrier(1 + warpgroup, kWarpgroup);
      const int rows = min(64, p.m - first_row), cols = min(kBoxCols, p.n - first_col);
      Element* y_box =
          static_cast<Element*>(p.y) + (int64_t{tile.batch} * p.m + first_row) * p.n + first_col;
      for (int i = thread; i < 64 * kBoxCols; i += kWarpgroup) {
        const int row = i / kBoxCols, col = i % kBoxCols;
        if (row < rows && col < cols) {
          y_box[int64_t{row} * p.n + col] =
              *reinterpret_cast<const Element*>(at(row, col * kElementBytes));
        }
      }
    }
  }
}

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    GemmKernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
               const __grid_constant__ CUtensorMap y_map, const Params p) {
  extern __shared__ uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<kBlockN>*>(
      (reinterpret_cast<uintptr_t>(raw) + kAlignment - 1) / kAlignment * kAlignment);
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int k_blocks = (p.k + kBlockK - 1) / kBlockK;
  const Schedule<kBlockN> schedule(p.batch, p.m, p.n);
  const int cluster = blockIdx.x / kCluster;
  const int clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages<kBlockN>; ++s) {
      BarrierInit(&shared.full[s], 1);
      // Every consumer warp of both blocks, since each block writes into the other's stage.
      BarrierInit(&shared.empty[s], kCluster * kConsumers * kWarpgroup / kWarp);
    }
    FenceBarrierInit();
  }
  ClusterSync();

  if (warpgroup == kConsumers) {
    RegistersDecrease<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      constexpr int kHalfN = kBlockN / kCluster;
      const int half = ClusterRank() * kHalfN;
      int step = 0;
      for (int index = cluster; index < schedule.total; index += clusters) {
        const Tile tile = schedule[index];
        for (int kb = 0; kb < k_blocks; ++kb, ++step) {
          const int s = step % kStages<kBlockN>;
          Stage<kBlockN>& stage = shared.stages[s];
          BarrierWait<true>(&shared.empty[s], (step / kStages<kBlockN> & 1) ^ 1);
          BarrierExpect(&shared.full[s], sizeof(Stage<kBlockN>));
          TensorLoad(stage.a, &a_map, &shared.full[s], kb * kBlockK, tile.row, tile.batch);
          TensorLoadMulticast(stage.b + half * kBlockK, &b_map, &shared.full[s],
                              (1 << kCluster) - 1, kb * kBlockK, tile.col + half, tile.batch);
        }
      }
    }
  } else {
    RegistersIncrease<kConsumerRegisters>();
    const int lane = threadIdx.x % kWarp;
    int step = 0;
    auto release = [&](int s) {
      if (lane < kCluster) BarrierArriveRemote(&shared.empty[s], lane);
    };
    for (int index = cluster; index < schedule.total; index += clusters) {
      const Tile tile = schedule[index];
      float sums[kBlockN / 2];
      float partial[kPromote ? kBlockN / 2 : 1];
      if constexpr (kPromote) {
#pragma unroll
        for (float& sum : sums) sum = 0;
      }
      for (int kb = 0; kb < k_blocks; ++kb, ++step) {
        const int s = step % kStages<kBlockN>;
        BarrierWait<true>(&shared.full[s], step / kStages<kBlockN> & 1);
        const uint64_t a = WgmmaDescriptor(shared.stages[s].a + warpgroup * 64 * kBlockK);
        const uint64_t b = WgmmaDescriptor(shared.stages[s].b);
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < kBlockK / kWgmmaK; ++i) {
          const uint64_t advance = i * kWgmmaK >> 4;
          if constexpr (kPromote) {
            Wgmma<kBlockN, kAE5M2, kBE5M2>(partial, a + advance, b + advance, i > 0);
          } else {
            Wgmma<kBlockN, kAE5M2, kBE5M2>(sums, a + advance, b + advance, kb > 0 || i > 0);
          }
        }
        WgmmaCommit();
        if constexpr (kPromote) {
          WgmmaWait<0>();
          release(s);
#pragma unroll
          for (int i = 0; i < kBlockN / 2; ++i) sums[i] += partial[i];
        } else {
          // The products before these are done: their stage may be filled again.
          WgmmaWait<1>();
          if (kb > 0) release((step - 1) % kStages<kBlockN>);
        }
      }
      if constexpr (!kPromote) {
        WgmmaWait<0>();
        release((step - 1) % kStages<kBlockN>);
      }
      const int64_t first_row = tile.row + threadIdx.x / kWarp * 16 + lane / 4;
      Place place;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        place.rows[h] = int64_t{tile.batch} * p.m + min(first_row + 8 * h, int64_t{p.m} - 1);
      }
      place.col = tile.col + 2 * (lane % 4);
      Finish(p, tile.batch, place, sums);
      auto& buffers = shared.store[warpgroup];
      switch (p.out_type) {
        case DType::kBF16:
          Store<kBlockN, __nv_bfloat162>(p, y_map, buffers, warpgroup, tile, sums);
          break;
        case DType::kF16:
          Store<kBlockN, __half2>(p, y_map, buffers, warpgroup, tile, sums);
          break;
        case DType::kF32:
          Store<kBlockN, float2>(p, y_map, buffers, warpgroup, tile, sums);
          break;
      }
    }
    if (threadIdx.x % kWarpgroup == 0) TensorStoreWaitRead<0>();
  }
  // No block leaves while the other may still write into its shared memory.
  __syncwarp();
  ClusterSync();
}

int OutBytes(DType type) { return type == DType::kF32 ? 4 : 2; }

template <int kBlockN, bool kAE5M2, bool kBE5M2, bool kPromote>
cudaError_t Launch(const Gemm& g, int sms, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<kBlockN>) + kAlignment;
  static_assert(kSharedBytes <= kSharedLimit && kStages<kBlockN> >= 4);
  const Params p{
      static_cast<int>(g.batch),
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
      g.y,
      g.out_type,
      g.n * OutBytes(g.out_type) % 16 == 0 && reinterpret_cast<uintptr_t>(g.y) % 16 == 0};
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
    status = MakeTensorMap(&y_map, type, OutBytes(g.out_type), g.y, g.batch, g.m, g.n, 64,
                           128 / OutBytes(g.out_type), CU_TENSOR_MAP_SWIZZLE_128B);
    if (status != cudaSuccess) return status;
  }
  auto kernel = GemmKernel<kBlockN, kAE5M2, kBE5M2, kPromote>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  const Schedule<kBlockN> schedule(p.batch, p.m, p.n);
  const int clusters = std::min(sms / kCluster, schedule.total);
  kernel<<<clusters * kCluster, kThreads, kSharedBytes, stream>>>(a_map, b_map, y_map, p);
  return cudaGetLastError();
}

// Time of a product with this tile in units of one column: rounds of tiles over the GPU, and per
// round the columns and what a tile costs beyond them.
template <int kBlockN>
int64_t Cost(const Gemm& g, int sms) {
  constexpr int kTileOverhead = 32;
  const Schedule<kBlockN> schedule(g.batch, g.m, g.n);
  const int64_t rounds = (schedule.total + sms / kCluster - 1) / (sms / kCluster);
  return rounds * (kBlockN + kTileOverhead);
}

template <bool kAE5M2, bool kBE5M2>
cudaError_t Dispatch(const Gemm& g, int sms, cudaStream_t stream) {
  // Two sets of accumulators leave registers for half the columns.
  if (g.promote) return Launch<128, kAE5M2, kBE5M2, true>(g, sms, stream);
  const int64_t least = std::min({Cost<128>(g, sms), Cost<192>(g, sms), Cost<256>(g, sms)});
  if (least == Cost<256>(g, sms)) return Launch<256, kAE5M2, kBE5M2, false>(g, sms, stream);
  if (least == Cost<192>(g, sms)) return Launch<192, kAE5M2, kBE5M2, false>(g, sms, stream);
  return Launch<128, kAE5M2, kBE5M2, false>(g, sms, stream);
}

}  // namespace

cudaError_t LaunchGemm(const Gemm& g, cudaStream_t stream) {
  if (g.batch == 0 || g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.k == 0 || g.k % 16 != 0) return cudaErrorInvalidValue;
  int device, sms;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  if (g.a_e5m2 && g.b_e5m2) return cudaErrorInvalidValue;
  if (g.a_e5m2) return Dispatch<true, false>(g, sms, stream);
  if (g.b_e5m2) return Dispatch<false, true>(g, sms, stream);
  return Dispatch<false, false>(g, sms, stream);
}

}  // namespace jfp4
