// What becomes of a tile's sums: scales, rank terms, bias and the estimator's slope, in FP32
// registers, then one cast on the way through shared memory to y.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/gemm_tile.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/slope.h"
#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// A warpgroup stores in boxes of 64 rows of 128 bytes, as many in flight as fit.
constexpr int kStoreBytes = kWgmmaM * 128;
template <int kBlockN>
constexpr int kStoreBuffers = kBlockN == kNarrow || kBlockN == kJoint ? 2 : 1;

// Scales, rank terms and bias, in FP32 and in this order, of a tile of kCols columns. Register 4 j
// + 2 h + c of half i is row row + 64 i + 8 h and column col + 8 j + c.
template <int kCols, int kHalves, int kSums>
__device__ __forceinline__ void Finish(const Params& p, int batch, int row, int col,
                                       float (&y)[kHalves][kSums]) {
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
      for (int j = 0; j < kCols / 8; ++j) {
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
    if (per_column && aligned && col + kCols - 7 < p.n) {
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
__device__ __forceinline__ void PrefetchSlope(const Params& p, const Tile& tile) {
  constexpr int kLine = 128;
  const int row = tile.row + threadIdx.x % kWarpgroup;
  static_assert(kBlockM == kWarpgroup);
  if (row >= p.m) return;
  const int bytes = ElementBytes(p.slope.type);
  const char* from = static_cast<const char*>(p.slope.w) +
                     ((int64_t{tile.batch} * p.m + row) * p.n + tile.col) * bytes;
  const int length = min(tile.cols, p.n - tile.col) * bytes;
  for (int i = 0; i < length; i += kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

// Multiplies by the estimator's slope; indices as in Finish.
template <DType kType, bool kAligned, int kCols, int kHalves, int kSums>
__device__ __forceinline__ void MultiplyBySlope(const Params& p, int batch, int row, int col,
                                                float (&sums)[kHalves][kSums]) {
  constexpr int kRows = 2 * kHalves;
  // Pairs of a row that are loaded together. Of the sums, some wait in local memory meanwhile.
  constexpr int kInFlight = kType == DType::kF32 ? 4 : 8;
  static_assert(kCols / 8 % kInFlight == 0);
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
  for (int first = 0; first < kCols / 8; first += kInFlight) {
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

template <int kCols, int kHalves, int kSums>
__device__ __forceinline__ void MultiplyBySlope(const Params& p, int batch, int row, int col,
                                                float (&sums)[kHalves][kSums]) {
  auto of_type = [&](auto type) {
    if (p.slope_aligned) {
      MultiplyBySlope<decltype(type)::value, true, kCols>(p, batch, row, col, sums);
    } else {
      MultiplyBySlope<decltype(type)::value, false, kCols>(p, batch, row, col, sums);
    }
  };
  if (p.slope.type == DType::kBF16) of_type(std::integral_constant<DType, DType::kBF16>());
  if (p.slope.type == DType::kF16) of_type(std::integral_constant<DType, DType::kF16>());
  if (p.slope.type == DType::kF32) of_type(std::integral_constant<DType, DType::kF32>());
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

// Writes 64 rows of a tile of kCols columns, from first_row on, in boxes of 128 bytes a row.
template <int kBytes, int kCols, int kBuffers, int kSums>
__device__ __forceinline__ void StoreBoxes(const Params& p, const CUtensorMap& y_map,
                                           uint8_t (&buffers)[kBuffers][kStoreBytes], int barrier,
                                           const Tile& tile, int first_row,
                                           const float (&y)[kSums]) {
  constexpr int kBoxCols = 128 / kBytes;
  constexpr int kBoxes = (kCols + kBoxCols - 1) / kBoxCols;
  // Buffers come in the same order in every call.
  static_assert(kCols % 16 == 0 && kBoxCols % 16 == 0 && kBoxes % kBuffers == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int lane = thread % kWarp;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    // The last box may reach back over columns that are written already, with the same values.
    constexpr int kLast = kCols - kBoxCols;
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
    if (!kAnyRows<2 * kSums> || p.bulk_store) {
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

template <int kCols, int kBuffers, int kSums>
__device__ __forceinline__ void Store(const Params& p, const CUtensorMap& y_map,
                                      uint8_t (&buffers)[kBuffers][kStoreBytes], int barrier,
                                      const Tile& tile, int first_row, const float (&y)[kSums]) {
  if (p.out_type == DType::kF32) {
    StoreBoxes<4, kCols>(p, y_map, buffers, barrier, tile, first_row, y);
  } else {
    StoreBoxes<2, kCols>(p, y_map, buffers, barrier, tile, first_row, y);
  }
}

}  // namespace jfp4
