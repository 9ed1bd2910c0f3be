// A launch of the product, and its tiles: their sizes, and the order in which clusters take them.
#pragma once

#include <cstdint>

#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/slope.h"
#include "cuda_ffi/kernels/tile_counter.cuh"
#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

constexpr int kCluster = 2;
constexpr int kBlockM = 128;
constexpr int kBlockK = 128;  // bytes, one swizzle row
constexpr int kWgmmaM = 64;

// A tile's columns. The more they are, the less is read for each product; but the more is computed
// past the end, too, where tiles are few, and the fewer registers are left to the epilogue. The
// widest have two warpgroups share a tile, so that its epilogue is not hidden. Wide ones may be
// followed by narrow ones, for those clusters that have no other in the last turn.
constexpr int kNarrow = 128;
constexpr int kMedium = 160;
constexpr int kWide = 192;
constexpr int kJoint = 256;

// What a launch is told.
struct Params {
  int batch, m, n, k;
  int full_cols;  // of tiles of the kernel's width
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
  TileCounter* counter;
  bool bulk_store;
};

// The accumulators of 64 rows and all columns of a tile, over a warpgroup.
template <int kBlockN>
using Sums = float[kBlockN / 2];

// Columns of b, about, that the blocks at work share in L2 while they go down the rows of a.
constexpr int kBandCols = 2560;

struct Tile {
  int batch, row, col, cols;  // row and col in elements, of this block
};

// The order of tiles: in bands of columns, down the rows of a band, along the columns of a row.
// What is right of them is in narrow tiles, which come last, also down the rows.
template <int kBlockN>
struct Schedule {
  int rows, cols, narrow_cols;  // in clusters
  int band;                     // columns of one
  int full, total;              // tiles

  __host__ __device__ Schedule(int batch, int m, int n, int full_cols)
      : rows((m + kCluster * kBlockM - 1) / (kCluster * kBlockM)),
        cols(full_cols),
        narrow_cols((max(0, n - cols * kBlockN) + kNarrow - 1) / kNarrow),
        full(batch * rows * cols),
        total(batch * rows * (cols + narrow_cols)) {
    // Of about the same width, all of them.
    const int bands = max(1, (cols * kBlockN + kBandCols / 2) / kBandCols);
    band = (cols + bands - 1) / bands;
  }

  __device__ Tile operator[](int index) const {
    if (index >= full) {
      index -= full;
      const int batch = index / (rows * narrow_cols);
      index -= batch * rows * narrow_cols;
      const int row = index / narrow_cols, col = index % narrow_cols;
      return At(batch, row, cols * kBlockN + col * kNarrow, kNarrow);
    }
    const int batch = index / (rows * cols);
    index -= batch * rows * cols;
    const int first = index / (rows * band) * band;
    index -= first * rows;
    const int width = min(band, cols - first);
    return At(batch, index / width, (first + index % width) * kBlockN, kBlockN);
  }

 private:
  __device__ static Tile At(int batch, int row, int col, int cols) {
    return {batch, (row * kCluster + static_cast<int>(ClusterRank())) * kBlockM, col, cols};
  }
};

}  // namespace jfp4
