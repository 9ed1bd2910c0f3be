// A launch of the packed product, its tiles, and what a block keeps of one in shared memory.
#pragma once

#include <cstdint>

#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/packed_codes.cuh"
#include "cuda_ffi/kernels/types.h"

namespace jfp4::packed {

constexpr int kConsumers = 4;  // warpgroups that multiply
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kConsumerWarps = kConsumerThreads / kWarp;
constexpr int kTokenWarps = 4;  // unpack a
// Five warps on each quarter of a multiprocessor have 96 registers, six would have 80.
constexpr int kThreads = kConsumerThreads + kTokenWarps * kWarp;
constexpr int kMaxSplit = 8;  // blocks of a cluster, as far as every Hopper GPU grants it

constexpr int kWgmmaRows = 64;
constexpr int kWgmmaK = 32;
constexpr int kChunk = 16;           // bytes that a thread loads at once
constexpr int kChunkK = 2 * kChunk;  // codes in it
constexpr int kSwizzleRow = 128;     // bytes
constexpr int kSwizzleRows = 8;      // after which the swizzle repeats
// A stage's share of a row of b, in nibbles, is a full cache line.
constexpr int kStageRowBytes = kSwizzleRow;
constexpr int kStageK = 2 * kStageRowBytes;
constexpr int kStageChunks = kStageRowBytes / kChunk;
// A segment of a stage, unpacked, is one row of the 128-byte swizzle; a chunk is one wgmma's share.
constexpr int kSegments = 2;
constexpr int kSegmentChunks = kStageChunks / kSegments;
static_assert(kSegmentChunks * kChunkK == kSwizzleRow && kChunkK == kWgmmaK);

constexpr int kSharedLimit = 227 * 1024;  // of a block
constexpr int kAlignment = 1024;          // of a 128-byte-swizzled tile

// Rows of b in a tile: any multiple of the swizzle's, so that shares can be equal.
constexpr int kMaxRows = kConsumers * kWgmmaRows;

// Warpgroups that take turns along k with the same rows, where a tile has few. Each must meet the
// same slots of a ring again and again: a barrier that is waited for only now and then may be a
// phase behind.
constexpr int kMaxSharers = 2;

// Steps whose codes of a are unpacked at once, for each warpgroup that takes turns. Of three, one
// is multiplied, one is there and one is being unpacked, and nobody waits; two always fit.
constexpr int kMinTurns = 2, kMaxTurns = 3;
constexpr int kMaxCodeSlots = kMaxTurns * kMaxSharers;

// Stages, whose nibbles are on their way: as many as hold so many bytes of b, and barriers. More
// are no help: with a third more, products of one token took up to 8 % longer.
constexpr int kBytesAhead = 112 * 1024;
constexpr int kMaxStages = 16;

// Tokens whose sums are shared out together, and of which a thread has four: two rows of two.
constexpr int kUnit = 8;

template <int kTokens>
struct Fixed {
  float a_scale[kTokens];
  float b_scale[kMaxRows];
  float bias[kMaxRows];
  uint64_t a_full[kMaxStages];  // nibbles are there
  uint64_t b_full[kMaxStages];
  uint64_t unpacked[kMaxCodeSlots];
  uint64_t empty[kMaxCodeSlots];  // codes are used up, and so is the stage they are of
};

// In swizzled rows: a's codes of a step, a segment after the other; its nibbles, which come before
// b's in a stage.
template <int kTokens>
constexpr int kTokenCodes = kSegments * kTokens * kSwizzleRow;
template <int kTokens>
constexpr int kTokenNibbles = kTokens * kStageRowBytes;

template <int kTokens>
constexpr int kRingBytes =
    (kSharedLimit - static_cast<int>(sizeof(Fixed<kTokens>))) / kAlignment * kAlignment;

template <int kTokens>
struct Shared {
  union {
    uint8_t rings[kRingBytes<kTokens>];              // codes of a, and then stages
    float4 sums[kTokens / kUnit][kConsumerThreads];  // once the last stage is used up
  };
  Fixed<kTokens> fixed;
};

struct Params {
  int batch, m, n;
  int m_tiles, n_tiles;
  int rows;        // of b, in a tile
  int row_groups;  // of them, a wgmma's each
  int sharers;     // warpgroups that take turns along k with the same row group
  int code_slots;  // steps whose codes of a there is room for
  int stages;
  int stage_bytes;
  int split;  // blocks of a cluster
  int steps;  // along k of each, and of as many as `longer` one more
  int longer;
  const float* a_scale;
  const float* b_scale;
  bool a_scale_rows, b_scale_rows;  // one number a row, rather than one a matrix
  const float* bias;
  void* y;
  DType out_type;
  bool pair_store;  // whether two neighbours in y are aligned to their size
};

// The tile of y that a cluster computes, and the steps along k that this block sums over.
struct Work {
  int rank, batch, first_token, first_row;
  int begin, steps;
};

// The first copies wait for this, so it divides only where it has to.
template <int kTokens>
__device__ __forceinline__ Work BlockWork(const Params& p) {
  const int rank = ClusterRank();
  // Tiles of the same rows of b are neighbours: they find them in L2.
  int n_tile = ClusterId(), m_tile = 0, batch = 0;
  if (p.m_tiles > 1) {
    m_tile = n_tile % p.m_tiles;
    n_tile /= p.m_tiles;
  }
  if (p.batch > 1) {
    batch = n_tile / p.n_tiles;
    n_tile -= batch * p.n_tiles;
  }
  return {rank,
          batch,
          m_tile * kTokens,
          n_tile * p.rows,
          rank * p.steps + min(rank, p.longer),
          p.steps + (rank < p.longer)};
}

}  // namespace jfp4::packed
