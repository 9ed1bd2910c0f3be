// What becomes of a tile's sums: those of the cluster are added up, scaled, biased and cast, each
// warpgroup its share of the tokens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/packed_codes.cuh"
#include "cuda_ffi/kernels/packed_tile.cuh"
#include "cuda_ffi/kernels/types.h"

namespace jfp4::packed {

constexpr float kUnscale = 4096;  // both operands are 2^-6 of their values

__device__ __forceinline__ void Round(float v, float* out) { *out = v; }
__device__ __forceinline__ void Round(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void Round(float v, __half* out) { *out = __float2half_rn(v); }

// Writes those of a warp's 16 rows of b, and of a unit's tokens, that are there. y is laid out over
// the lanes as sums are.
template <typename T>
__device__ __forceinline__ void StoreUnit(const Params& p, const Work& work, int token, int row,
                                          const float (&y)[4]) {
  const int lane = threadIdx.x % kWarp;
  const int tokens = p.m - work.first_token, rows = min(p.rows, p.n - work.first_row);
  T* out =
      static_cast<T*>(p.y) + (int64_t{work.batch} * p.m + work.first_token) * p.n + work.first_row;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (sizeof(T) == 2) {
      // Two tokens of a row become two rows of a token, which are neighbours in memory.
      alignas(4) T pair[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) Round(y[2 * h + c], &pair[c]);
      *reinterpret_cast<uint32_t*>(pair) = Transpose(*reinterpret_cast<const uint32_t*>(pair));
      const int t = token + lane / 4, r = row + 8 * h + lane % 4 * 2;
      if (t >= tokens || r >= rows) continue;
      T* at = out + int64_t{t} * p.n + r;
      if (p.pair_store) {
        *reinterpret_cast<uint32_t*>(at) = *reinterpret_cast<const uint32_t*>(pair);
      } else {
        at[0] = pair[0];
        if (r + 1 < rows) at[1] = pair[1];
      }
    } else {
      const int r = row + 8 * h + lane / 4;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int t = token + lane % 4 * 2 + c;
        if (t < tokens && r < rows) Round(y[2 * h + c], &out[int64_t{t} * p.n + r]);
      }
    }
  }
}

// Adds up the sums of the kParts warpgroups of the cluster that have the same rows of b, and writes
// this one's share of the tokens: units that follow one another, or one, or, where there are fewer
// units than warpgroups, none. What a warpgroup keeps never leaves its registers.
template <int kTokens, int kParts>
__device__ __forceinline__ void Finish(const Params& p, const Work& work, int row_group, int sharer,
                                       const float (&sums)[kTokens / 2], Shared<kTokens>& shared) {
  constexpr int kUnits = kTokens / kUnit;
  constexpr int kOwn = kUnits > kParts ? kUnits / kParts : 1;
  const Fixed<kTokens>& fixed = shared.fixed;
  const bool multiplied = sharer < p.sharers;
  const int part = work.rank * p.sharers + sharer;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (multiplied && u / kOwn != part) {
      shared.sums[u][threadIdx.x] =
          make_float4(sums[4 * u], sums[4 * u + 1], sums[4 * u + 2], sums[4 * u + 3]);
    }
  }
  ClusterSync();
  // What is not stored is not read: a read that nothing waits for could outlast its block.
  const int lane = threadIdx.x % kWarp;
  const int row = row_group * kWgmmaRows + threadIdx.x % kWarpgroup / kWarp * 16;
  const int first_token = part * kOwn * kUnit;
  if (!multiplied || row >= min(p.rows, p.n - work.first_row)) return;
  if (first_token >= min(kTokens, p.m - work.first_token)) return;
  float y[kOwn][4];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u / kOwn != part) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) y[u % kOwn][i] = sums[4 * u + i];
  }
  // Of two sharers, a part's lowest bit says which.
  static_assert(kMaxSharers == 2);
  const int sharer_bit = p.sharers - 1;
  // As many at once as there are registers for.
  constexpr int kBatch = kParts <= 2 ? 1 : kParts == 4 ? 3 : 4;
#pragma unroll
  for (int first = 1; first < kParts; first += kBatch) {
    float4 others[kBatch][kOwn];
#pragma unroll
    for (int d = 0; d < kBatch; ++d) {
      if (first + d >= kParts) continue;
      // So that not all read the same one's at the same time.
      const int other = part ^ (first + d);
      const int warpgroup = (other & sharer_bit) * p.row_groups + row_group;
      const int thread = warpgroup * kWarpgroup + threadIdx.x % kWarpgroup;
      const uint32_t from =
          MapToRank(SharedAddress(&shared.sums[part * kOwn][thread]), other >> sharer_bit);
#pragma unroll
      for (int q = 0; q < kOwn; ++q) {
        others[d][q] = make_float4(0, 0, 0, 0);
        if (first_token + q * kUnit < p.m - work.first_token) {
          others[d][q] = LoadCluster(from + q * static_cast<int>(sizeof(shared.sums[0])));
        }
      }
    }
#pragma unroll
    for (int d = 0; d < kBatch; ++d) {
      if (first + d >= kParts) continue;
#pragma unroll
      for (int q = 0; q < kOwn; ++q) {
        y[q][0] += others[d][q].x;
        y[q][1] += others[d][q].y;
        y[q][2] += others[d][q].z;
        y[q][3] += others[d][q].w;
      }
    }
  }
  float b_scale[2], bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    b_scale[h] = fixed.b_scale[row + lane / 4 + 8 * h];
    bias[h] = fixed.bias[row + lane / 4 + 8 * h];
  }
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    const int token = first_token + q * kUnit + lane % 4 * 2;
    const float a_scale[2] = {fixed.a_scale[token], fixed.a_scale[token + 1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[q][i] = __fmul_rn(y[q][i] * kUnscale, a_scale[i % 2]);
      y[q][i] = __fmul_rn(y[q][i], b_scale[i / 2]);
      if (p.bias != nullptr) y[q][i] = __fadd_rn(y[q][i], bias[i / 2]);
    }
  }
  const auto store = [&](auto type) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      StoreUnit<decltype(type)>(p, work, first_token + q * kUnit, row, y[q]);
    }
  };
  switch (p.out_type) {
    case DType::kBF16:
      return store(__nv_bfloat16());
    case DType::kF16:
      return store(__half());
    case DType::kF32:
      return store(float());
  }
}

// What the end multiplies and adds, a row of b and of a each thread: on their way from the start,
// so that the end need not wait for them.
template <int kTokens>
struct Factors {
  static_assert(kMaxRows <= kConsumerThreads && kTokens <= kConsumerThreads);
  float a_scale = 0, b_scale = 0, bias = 0;

  __device__ __forceinline__ Factors(const Params& p, const Work& work) {
    const int i = threadIdx.x;
    if (i < p.rows) {
      const int64_t row = int64_t{work.batch} * p.n + min(work.first_row + i, p.n - 1);
      b_scale = p.b_scale[p.b_scale_rows ? row : work.batch];
      if (p.bias != nullptr) bias = p.bias[row];
    }
    if (i < kTokens) {
      const int64_t token = int64_t{work.batch} * p.m + min(work.first_token + i, p.m - 1);
      a_scale = p.a_scale[p.a_scale_rows ? token : work.batch];
    }
  }

  __device__ __forceinline__ void Share(const Params& p, Fixed<kTokens>& fixed) const {
    const int i = threadIdx.x;
    if (i < p.rows) {
      fixed.b_scale[i] = b_scale;
      fixed.bias[i] = bias;
    }
    if (i < kTokens) fixed.a_scale[i] = a_scale;
  }
};

}  // namespace jfp4::packed
