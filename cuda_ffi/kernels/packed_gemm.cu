// The codes of b stream once from memory, so everything serves keeping many of their bytes in
// flight. A cluster of blocks computes one tile of y, each block over its own share of k; two such
// blocks fit an SM, and whenever the tiles allow it all blocks of a product run at the same time.
//
// Tensor cores read E4M3: the nibble s e e m, placed as the byte s 0 0 e e m 0 0, is its E2M1 value
// times 2^-6 exactly, subnormals included, so unpacking is shifts and masks and no table. Rows of b
// are the 64 rows of a wgmma, from registers; rows of a are its columns, from shared memory.
//
// In a block one warp copies b's nibbles into a ring of shared-memory stages, three warps fetch a,
// unpack it and add it to the stages, and two warpgroups unpack b into registers and multiply.
// Then the blocks of the cluster read each other's sums, which are exact, so that neither their
// number nor their order shows in y.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>

#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/packed_gemm.h"

namespace jfp4 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kThreads = kConsumerThreads + kWarpgroup;
constexpr int kTokenWarps = kWarpgroup / kWarp - 1;  // producers of a; the remaining one copies b
constexpr int kBlocksPerSm = 2;
constexpr int kMaxSplit = 8;  // blocks of a cluster, as far as every Hopper GPU grants it

constexpr int kWgmmaRows = 64;
constexpr int kWgmmaK = 32;
constexpr int kChunk = 16;           // bytes that a thread copies or loads at once
constexpr int kChunkK = 2 * kChunk;  // codes in it
constexpr int kStageRowBytes = 128;  // of nibbles: a stage's share of a row, a full cache line
constexpr int kStageK = 2 * kStageRowBytes;
constexpr int kStageChunks = kStageRowBytes / kChunk;
// A lane of a wgmma holds the codes of one chunk in four of them: a quad of lanes spans a segment,
// which unpacked is one row of the 128-byte swizzle.
constexpr int kSegments = 2;
constexpr int kSegmentChunks = kStageChunks / kSegments;
constexpr int kSegmentWgmmas = kChunk / 4;
constexpr int kSwizzleRow = 128;
static_assert(kSegmentChunks * kChunkK == kSwizzleRow);
static_assert(kSegmentWgmmas * kWgmmaK == kSwizzleRow);

constexpr float kUnscale = 4096;  // both operands are 2^-6 of their values

constexpr int kSharedLimit = 113 * 1024;  // of a block, with two of them on an SM
constexpr int kAlignment = 1024;          // of a 128-byte-swizzled tile

// Of b's rows, so that a tile's share of a stays small beside its share of b. With 64 rows the two
// warpgroups take turns along k.
template <int kTokens>
constexpr int kRows = kTokens <= 16 ? kWgmmaRows : kConsumers * kWgmmaRows;

// Warpgroups that add to the same sums.
template <int kTokens>
constexpr int kSharers = kConsumers * kWgmmaRows / kRows<kTokens>;

template <int kTokens>
struct Stage {
  uint8_t tokens[kSegments][kTokens * kSwizzleRow];  // of a, unpacked
  uint8_t rows[kRows<kTokens> * kStageRowBytes];     // of b, nibbles
};

// A warpgroup's sums. A quad's lanes write columns two apart: the padding keeps those of a warp in
// different banks, and four neighbours along n loadable at once.
constexpr int kSumsPitch = kWgmmaRows + 4;
static_assert(2 * kSumsPitch % 32 == 8 && kSumsPitch % 4 == 0);

template <int kTokens>
struct Factors {
  float b_scale[kRows<kTokens>];
  float bias[kRows<kTokens>];
  float a_scale[kTokens];
};

template <int kTokens>
constexpr int kStages =
    (kSharedLimit - kAlignment - static_cast<int>(sizeof(Factors<kTokens>)) - 256) /
    static_cast<int>(sizeof(Stage<kTokens>));

template <int kTokens>
struct Shared {
  union {
    Stage<kTokens> stages[kStages<kTokens>];
    float sums[kConsumers][kTokens][kSumsPitch];  // once the last stage is used up
  };
  Factors<kTokens> factors;
  uint64_t full[kStages<kTokens>];
  uint64_t empty[kStages<kTokens>];
};

struct Params {
  int m, n, k;
  int m_tiles, n_tiles;
  int split;  // blocks of a cluster
  const uint8_t* a;
  const uint8_t* b;
  const float* a_scale;
  const float* b_scale;
  bool a_scale_rows, b_scale_rows;  // one number a row, rather than one a matrix
  const float* bias;
  void* y;
  DType out_type;
  bool vector_store;  // whether four neighbours in y are aligned to their size
};

// The tile of y that a cluster computes, and the stages along k that this block sums over.
struct Work {
  int batch, first_token, first_row;
  int begin, end;
};

template <int kTokens>
__device__ __forceinline__ Work BlockWork(const Params& p) {
  const int rank = blockIdx.x % p.split;
  // Tiles of the same rows of b are neighbours: they find them in L2.
  const int tile = blockIdx.x / p.split;
  const int band = tile / p.m_tiles;
  const int batch = band / p.n_tiles;
  const int stages = (p.k + kStageK - 1) / kStageK;
  return {batch, tile % p.m_tiles * kTokens, (band - batch * p.n_tiles) * kRows<kTokens>,
          rank * stages / p.split, (rank + 1) * stages / p.split};
}

// --- instructions that hopper.cuh has no use for ---

__device__ __forceinline__ void CopyChunk(uint32_t shared_address, const uint8_t* source) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], %2;" ::"r"(shared_address),
               "l"(source), "n"(kChunk)
               : "memory");
}

// Arrives at the barrier once this thread's copies so far have landed.
__device__ __forceinline__ void BarrierArriveCopied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

__device__ __forceinline__ uint4 LoadChunk(const uint8_t* source) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

__device__ __forceinline__ uint4 LoadShared(uint32_t shared_address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address)
               : "memory");
  return v;
}

__device__ __forceinline__ void StoreShared(uint32_t shared_address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_address), "r"(v) : "memory");
}

__device__ __forceinline__ float4 LoadCluster(uint32_t cluster_address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(cluster_address)
               : "memory");
  return v;
}

// d[64, n] += a[64, 32] b[n, 32]^T in E4M3, a in registers. In a warp, a[h + 2 i] is row
// lane / 4 + 8 h and columns 16 i + 4 (lane % 4) + {0, 1, 2, 3}; d[4 j + 2 h + c] is row
// lane / 4 + 8 h and column 8 j + 2 (lane % 4) + c. PTX ISA, section 9.7.15.
__device__ __forceinline__ void Wgmma(float (&d)[4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// --- nibbles to E4M3 ---

constexpr uint32_t kSign = 0x80808080, kMagnitude = 0x1C1C1C1C;

__device__ __forceinline__ uint32_t EvenCodes(uint32_t nibbles) {
  return (nibbles << 4 & kSign) | (nibbles << 2 & kMagnitude);
}

__device__ __forceinline__ uint32_t OddCodes(uint32_t nibbles) {
  return (nibbles & kSign) | (nibbles >> 2 & kMagnitude);
}

// The order of codes along k is free as long as both operands keep to it. Lane q of a quad holds
// chunk q of the segment; word i of it goes to wgmma i, its even codes as the first four bytes
// that this lane supplies and its odd ones as the second: bytes 4 q and 16 + 4 q.

// --- the parts of a block ---

template <int kTokens>
__device__ __forceinline__ void CopyRows(const Params& p, const Work& work,
                                         Shared<kTokens>& shared) {
  constexpr int kRowsAtOnce = kWarp / kStageChunks;
  const int lane = threadIdx.x % kWarp;
  const int row = lane / kStageChunks, chunk = lane % kStageChunks;
  const int64_t pitch = p.k / 2;
  const uint8_t* b = p.b + int64_t{work.batch} * p.n * pitch;
  // Swaps the segments of odd rows: eight lanes that load two rows' chunks then use all banks.
  static_assert(kRowsAtOnce % 2 == 0);
  const int place = row * kStageRowBytes + (chunk ^ row % 2 * kSegmentChunks) * kChunk;
  for (int s = work.begin; s < work.end; ++s) {
    const int slot = (s - work.begin) % kStages<kTokens>;
    BarrierWait(&shared.empty[slot], ((s - work.begin) / kStages<kTokens> & 1) ^ 1);
    // What lies past an edge is replaced by what lies on it: rows past n are not stored, and codes
    // past k meet zeros of a.
    const uint8_t* column = b + min(s * kStageChunks + chunk, p.k / kChunkK - 1) * kChunk;
    const uint32_t destination = SharedAddress(shared.stages[slot].rows) + place;
#pragma unroll 8  // not all of them: the addresses would be kept from stage to stage, and spill
    for (int i = 0; i < kRows<kTokens>; i += kRowsAtOnce) {
      CopyChunk(destination + i * kStageRowBytes,
                column + min(work.first_row + i + row, p.n - 1) * pitch);
    }
    BarrierArriveCopied(&shared.full[slot]);
  }
}

template <int kTokens>
__device__ __forceinline__ void UnpackTokens(const Params& p, const Work& work, int warp,
                                             Shared<kTokens>& shared) {
  // A warp takes eight rows of a segment at once, a quad of lanes each. Every store of a warp then
  // covers all banks.
  constexpr int kRowsAtOnce = kWarp / kSegmentChunks;
  constexpr int kGroups = kTokens / kRowsAtOnce;
  constexpr int kItems = kSegments * kGroups;
  constexpr int kLoads = kItems < 8 ? kItems : 8;  // in flight, as far as registers allow
  static_assert(kTokens % kRowsAtOnce == 0 && kItems % kLoads == 0 && kRowsAtOnce == 8);
  const int lane = threadIdx.x % kWarp;
  const int row = lane / kSegmentChunks, chunk = lane % kSegmentChunks;
  const int64_t pitch = p.k / 2;
  const uint8_t* a = p.a + (int64_t{work.batch} * p.m + work.first_token + row) * pitch;
  const int tokens = p.m - work.first_token - row;
  for (int s = work.begin + warp; s < work.end; s += kTokenWarps) {
    const int slot = (s - work.begin) % kStages<kTokens>;
#pragma unroll 1
    for (int first = 0; first < kItems; first += kLoads) {
      uint4 nibbles[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int segment = (first + i) / kGroups;
        const int token = (first + i) % kGroups * kRowsAtOnce;
        const int column = s * kStageChunks + segment * kSegmentChunks + chunk;
        nibbles[i] = make_uint4(0, 0, 0, 0);
        if (token < tokens && column < p.k / kChunkK) {
          nibbles[i] = LoadChunk(a + token * pitch + column * kChunk);
        }
      }
      BarrierWait(&shared.empty[slot], ((s - work.begin) / kStages<kTokens> & 1) ^ 1);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int segment = (first + i) / kGroups;
        const int token = (first + i) % kGroups * kRowsAtOnce;
        const uint32_t words[] = {nibbles[i].x, nibbles[i].y, nibbles[i].z, nibbles[i].w};
        // Exclusive or with a multiple of 16 moves along the swizzled row.
        const uint32_t place = SharedAddress(shared.stages[slot].tokens[segment]) +
                               (token + row) * kSwizzleRow + row * kChunk + chunk * 4;
#pragma unroll
        for (int w = 0; w < kSegmentWgmmas; ++w) {
          StoreShared(place ^ w * kWgmmaK, EvenCodes(words[w]));
          StoreShared(place ^ (w * kWgmmaK + kWgmmaK / 2), OddCodes(words[w]));
        }
      }
    }
    FenceAsyncProxy();
    __syncwarp();
    if (lane == 0) BarrierArrive(&shared.full[slot]);
  }
}

template <int kTokens>
__device__ __forceinline__ void Multiply(const Work& work, Shared<kTokens>& shared,
                                         float (&sums)[kTokens / 2]) {
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int warp = threadIdx.x % kWarpgroup / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int row = (kSharers<kTokens> == 1 ? warpgroup * kWgmmaRows : 0) + warp * 16 + lane / 4;
  const int first = kSharers<kTokens> == 1 ? 0 : warpgroup;
#pragma unroll
  for (float& sum : sums) sum = 0;
  for (int s = first; s < work.end - work.begin; s += kSharers<kTokens>) {
    const int slot = s % kStages<kTokens>;
    Stage<kTokens>& stage = shared.stages[slot];
    const uint32_t place = SharedAddress(stage.rows) + row * kStageRowBytes + lane % 4 * kChunk;
    auto load = [&](int segment, uint4(&nibbles)[2]) {
      const uint32_t from = place + (segment ^ row % 2) * kSegmentChunks * kChunk;
      nibbles[0] = LoadShared(from);
      nibbles[1] = LoadShared(from + 8 * kStageRowBytes);
    };
    BarrierWait(&shared.full[slot], s / kStages<kTokens> & 1);
    uint4 nibbles[2];
    load(0, nibbles);
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      const uint32_t words[2][4] = {{nibbles[0].x, nibbles[0].y, nibbles[0].z, nibbles[0].w},
                                    {nibbles[1].x, nibbles[1].y, nibbles[1].z, nibbles[1].w}};
      uint32_t codes[kSegmentWgmmas][4];
#pragma unroll
      for (int w = 0; w < kSegmentWgmmas; ++w) {
        codes[w][0] = EvenCodes(words[0][w]);
        codes[w][1] = EvenCodes(words[1][w]);
        codes[w][2] = OddCodes(words[0][w]);
        codes[w][3] = OddCodes(words[1][w]);
      }
      const uint64_t tokens = WgmmaDescriptor(stage.tokens[segment]);
      WgmmaFence();
#pragma unroll
      for (int w = 0; w < kSegmentWgmmas; ++w) Wgmma(sums, codes[w], tokens + (w * kWgmmaK >> 4));
      WgmmaCommit();
      if (segment + 1 < kSegments) load(segment + 1, nibbles);
      WgmmaWait<0>();
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(&shared.empty[slot]);
  }
}

// Puts a warpgroup's sums where the cluster can read them, along n.
template <int kTokens>
__device__ __forceinline__ void ShareSums(const float (&sums)[kTokens / 2],
                                          Shared<kTokens>& shared) {
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
  auto& out = shared.sums[threadIdx.x / kWarpgroup];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    out[i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2][row + i / 2 % 2 * 8] = sums[i];
  }
}

__device__ __forceinline__ void Round(float v, float* out) { *out = v; }
__device__ __forceinline__ void Round(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void Round(float v, __half* out) { *out = __float2half_rn(v); }

// Writes those of four neighbours along n that are left of the edge.
template <typename T>
__device__ __forceinline__ void StoreFour(const Params& p, int64_t index, int columns,
                                          const float (&v)[4]) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  } four;
#pragma unroll
  for (int c = 0; c < 4; ++c) Round(v[c], &four.v[c]);
  T* y = static_cast<T*>(p.y) + index;
  if (p.vector_store) {
    if (columns > 0) *reinterpret_cast<Four*>(y) = four;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < columns) y[c] = four.v[c];
    }
  }
}

// Adds up the blocks' sums and writes this block's share of the tile.
template <int kTokens>
__device__ __forceinline__ void Finish(const Params& p, const Work& work, Shared<kTokens>& shared) {
  constexpr int kFours = kRows<kTokens> / 4;
  const int tokens = min(kTokens, p.m - work.first_token);
  const int rank = blockIdx.x % p.split;
#pragma unroll 1
  for (int i = rank * kThreads + threadIdx.x; i < tokens * kFours; i += p.split * kThreads) {
    const int token = i / kFours, row = i % kFours * 4;
    float y[4] = {0, 0, 0, 0};
#pragma unroll
    for (int sharer = 0; sharer < kSharers<kTokens>; ++sharer) {
      const int warpgroup = kSharers<kTokens> == 1 ? row / kWgmmaRows : sharer;
      const uint32_t mine = SharedAddress(&shared.sums[warpgroup][token][row % kWgmmaRows]);
      // All on their way before the first is needed.
      float4 parts[kMaxSplit];
#pragma unroll
      for (int r = 0; r < kMaxSplit; ++r) {
        parts[r] = make_float4(0, 0, 0, 0);
        if (r < p.split) parts[r] = LoadCluster(MapToRank(mine, r));
      }
#pragma unroll
      for (const float4& part : parts) {
        y[0] += part.x;
        y[1] += part.y;
        y[2] += part.z;
        y[3] += part.w;
      }
    }
    const Factors<kTokens>& factors = shared.factors;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      y[c] = __fmul_rn(y[c] * kUnscale, factors.a_scale[token]);
      y[c] = __fmul_rn(y[c], factors.b_scale[row + c]);
      if (p.bias != nullptr) y[c] = __fadd_rn(y[c], factors.bias[row + c]);
    }
    const int64_t y_row = int64_t{work.batch} * p.m + work.first_token + token;
    const int64_t index = y_row * p.n + work.first_row + row;
    const int columns = p.n - work.first_row - row;
    switch (p.out_type) {
      case DType::kBF16:
        StoreFour<__nv_bfloat16>(p, index, columns, y);
        break;
      case DType::kF16:
        StoreFour<__half>(p, index, columns, y);
        break;
      case DType::kF32:
        StoreFour<float>(p, index, columns, y);
        break;
    }
  }
}

// Fetched while the first stages are on their way, so that the end need not wait for them.
template <int kTokens>
__device__ __forceinline__ void LoadFactors(const Params& p, const Work& work,
                                            Factors<kTokens>& factors) {
  static_assert(kRows<kTokens> <= kConsumerThreads && kTokens <= kConsumerThreads);
  const int i = threadIdx.x;
  if (i < kRows<kTokens>) {
    const int64_t row = int64_t{work.batch} * p.n + min(work.first_row + i, p.n - 1);
    factors.b_scale[i] = p.b_scale[p.b_scale_rows ? row : work.batch];
    if (p.bias != nullptr) factors.bias[i] = p.bias[row];
  }
  if (i < kTokens) {
    const int64_t token = int64_t{work.batch} * p.m + min(work.first_token + i, p.m - 1);
    factors.a_scale[i] = p.a_scale[p.a_scale_rows ? token : work.batch];
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) PackedGemmKernel(const Params p) {
  extern __shared__ uint8_t raw[];
  // As an offset, so that the compiler still sees that this is shared memory.
  auto& shared = *reinterpret_cast<Shared<kTokens>*>(raw + (-SharedAddress(raw) % kAlignment));
  const Work work = BlockWork<kTokens>(p);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages<kTokens>; ++s) {
      BarrierInit(&shared.full[s], kWarp + 1);  // the lanes that copy b, and the warp with a
      BarrierInit(&shared.empty[s], kConsumerThreads / kWarp / kSharers<kTokens>);
    }
    FenceBarrierInit();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumerThreads) {
    const int warp = (threadIdx.x - kConsumerThreads) / kWarp;
    if (warp == kTokenWarps) {
      CopyRows(p, work, shared);
    } else {
      UnpackTokens(p, work, warp, shared);
    }
    __syncwarp();
  } else {
    LoadFactors(p, work, shared.factors);
    float sums[kTokens / 2];
    Multiply(work, shared, sums);
    // The sums overwrite stages: both warpgroups must have used theirs up.
    NamedBarrier(1, kConsumerThreads);
    ShareSums(sums, shared);
  }
  ClusterSync();
  Finish(p, work, shared);
  // No block leaves while another may still read its sums.
  if (p.split > 1) {
    __syncwarp();
    ClusterSync();
  }
}

template <int kTokens>
constexpr int kSharedBytes = sizeof(Shared<kTokens>) + kAlignment;

cudaLaunchAttribute ClusterOf(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Into how many blocks to split k: as many as still run all at once.
template <int kTokens>
int Split(int64_t tiles, int stages) {
  static const std::array<int, kMaxSplit + 1> clusters_at_once = [] {
    std::array<int, kMaxSplit + 1> counts{};
    for (int split = 1; split <= kMaxSplit; ++split) {
      cudaLaunchAttribute cluster = ClusterOf(split);
      cudaLaunchConfig_t config{};
      config.gridDim = split;
      config.blockDim = kThreads;
      config.dynamicSmemBytes = kSharedBytes<kTokens>;
      config.attrs = &cluster;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&counts[split], PackedGemmKernel<kTokens>, &config) !=
          cudaSuccess) {
        counts[split] = 0;
      }
    }
    return counts;
  }();
  for (int split = std::min(kMaxSplit, stages); split > 1; --split) {
    if (clusters_at_once[split] >= tiles) return split;
  }
  return 1;
}

template <int kTokens>
cudaError_t Launch(const PackedGemm& g, cudaStream_t stream) {
  static_assert(kSharedBytes<kTokens> <= kSharedLimit && kStages<kTokens> >= 3);
  static_assert(sizeof(Stage<kTokens>) % kAlignment == 0);
  static_assert(sizeof(Shared<kTokens>::sums) <= sizeof(Shared<kTokens>::stages));
  auto kernel = PackedGemmKernel<kTokens>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            kSharedBytes<kTokens>);
  if (status != cudaSuccess) return status;
  const int64_t m_tiles = (g.m + kTokens - 1) / kTokens;
  const int64_t n_tiles = (g.n + kRows<kTokens> - 1) / kRows<kTokens>;
  const int64_t tiles = g.batch * m_tiles * n_tiles;
  const int split = Split<kTokens>(tiles, (g.k + kStageK - 1) / kStageK);
  const int width = g.out_type == DType::kF32 ? 4 : 2;
  const Params p{static_cast<int>(g.m),
                 static_cast<int>(g.n),
                 static_cast<int>(g.k),
                 static_cast<int>(m_tiles),
                 static_cast<int>(n_tiles),
                 split,
                 g.a,
                 g.b,
                 g.a_scale,
                 g.b_scale,
                 g.a_scale_size != 1,
                 g.b_scale_size != 1,
                 g.bias,
                 g.y,
                 g.out_type,
                 g.n % 4 == 0 && reinterpret_cast<uintptr_t>(g.y) % (4 * width) == 0};
  cudaLaunchAttribute cluster = ClusterOf(split);
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(tiles * split);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes<kTokens>;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t LaunchPackedGemm(const PackedGemm& g, cudaStream_t stream) {
  if (g.batch == 0 || g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.k % kChunkK != 0) return cudaErrorInvalidValue;
  if (g.m <= 8) return Launch<8>(g, stream);
  if (g.m <= 16) return Launch<16>(g, stream);
  if (g.m <= 32) return Launch<32>(g, stream);
  return Launch<64>(g, stream);
}

}  // namespace jfp4
