#include "cuda_ffi/host/product.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/element.h"
#include "cuda_ffi/host/parallel.h"
#include "cuda_ffi/host/tiles.h"

namespace jfp4::host {
namespace {

using Pool = xla::ffi::ThreadPool;

constexpr int64_t RoundUp(int64_t v, int64_t multiple) {
  return (v + multiple - 1) / multiple * multiple;
}

// An operand of one product: rows of codes along the contraction.
struct Operand {
  const uint8_t* data;
  Encoding encoding;
  int64_t rows, k;

  int64_t row_bytes() const { return encoding == Encoding::kNibbles ? k / 2 : k; }

  // The codes [begin, end) of a row, as bytes of E4M3 or E5M2.
  void Read(int64_t row, int64_t begin, int64_t end, uint8_t* to) const {
    const uint8_t* from = data + row * row_bytes();
    if (encoding != Encoding::kNibbles) {
      std::copy(from + begin, from + end, to);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      *to++ = ByteOf(i % 2 ? from[i / 2] >> 4 : from[i / 2] & 15);
    }
  }

  float Value(uint8_t byte) const { return CodeValue(byte, encoding == Encoding::kE5M2); }
};

// Which bytes there are among the codes of an operand.
std::array<bool, 256> SeenBytes(const Operand& x, Pool pool) {
  std::array<bool, 256> seen{};
  if (x.encoding == Encoding::kNibbles) {
    for (int nibble = 0; nibble < 16; ++nibble) seen[ByteOf(nibble)] = true;
    return seen;
  }
  constexpr int64_t kRows = 64;
  std::vector<std::array<bool, 256>> parts((x.rows + kRows - 1) / kRows);
  ParallelFor(pool, parts.size(), [&](int64_t part) {
    const uint8_t* begin = x.data + part * kRows * x.k;
    const uint8_t* end = begin + std::min(kRows, x.rows - part * kRows) * x.k;
    for (; begin < end; ++begin) parts[part][*begin] = true;
  });
  for (const auto& part : parts) {
    for (int byte = 0; byte < 256; ++byte) seen[byte] |= part[byte];
  }
  return seen;
}

// The integers `factor * code` of an operand, where they are small enough.
struct Lattice {
  int32_t factor;
  int32_t max;
  int8_t table[256];
};

// Whether all codes of an operand are so many halves, quarters or eighths, up to 64 of the coarsest
// of these that does, as those of the 4-bit formats are. (Smaller numbers leave more room for
// sums.)
bool FindLattice(const Operand& x, Pool pool, Lattice& lattice) {
  constexpr int32_t kMax = 64;
  const std::array<bool, 256> seen = SeenBytes(x, pool);
  const auto fits = [&](int32_t factor) {
    lattice.factor = factor;
    lattice.max = 1;
    for (int byte = 0; byte < 256; ++byte) {
      if (!seen[byte]) continue;
      const float v = x.Value(byte) * factor;
      if (!(std::fabs(v) <= kMax) || v != std::nearbyint(v)) return false;
      lattice.table[byte] = static_cast<int8_t>(v);
      lattice.max = std::max(lattice.max, std::abs(static_cast<int32_t>(v)));
    }
    return true;
  };
  return fits(2) || fits(4) || fits(8);
}

// Codes as integers plus `offset`, in rows padded with zeros to kIntegerLanes, and the sums of
// rows.
template <typename T>
struct IntegerPanel {
  IntegerPanel(const Operand& x, const Lattice& lattice, int32_t offset, int64_t row_multiple,
               Pool pool)
      : k(RoundUp(x.k, kIntegerLanes)), values(RoundUp(x.rows, row_multiple) * k), sums(x.rows) {
    T table[256];
    for (int i = 0; i < 256; ++i) table[i] = static_cast<T>(lattice.table[i] + offset);
    ParallelFor(pool, x.rows, [&](int64_t row) {
      constexpr int64_t kChunk = 512;
      uint8_t bytes[kChunk];
      T* to = values.data() + row * k;
      int32_t sum = 0;
      for (int64_t p = 0; p < x.k; p += kChunk) {
        const int64_t count = std::min(kChunk, x.k - p);
        x.Read(row, p, p + count, bytes);
        for (int64_t i = 0; i < count; ++i) sum += to[p + i] = table[bytes[i]];
      }
      sums[row] = sum;
    });
  }

  const T* Row(int64_t row) const { return values.data() + row * k; }

  int64_t k;
  std::vector<T> values;
  std::vector<int32_t> sums;
};

// What is done to the sums of a product.
struct Epilogue {
  const Gemm& args;
  int64_t batch;

  // Sums of columns [col, col + count) of a row, which are overwritten.
  void Finish(int64_t row, int64_t col, int64_t count, float* sums) const {
    const Gemm& g = args;
    const float a_scale = g.a_scale[g.a_scale_size == 1 ? batch : batch * g.m + row];
    const float* b_scale = g.b_scale + batch * g.b_scale_size;
    for (int64_t c = 0; c < count; ++c) {
      sums[c] = (sums[c] * a_scale) * b_scale[g.b_scale_size == 1 ? 0 : col + c];
    }
    if (g.rank > 0) {
      const float* u = g.u + (batch * g.m + row) * g.rank;
      const float* v = g.v + batch * g.rank * g.n + col;
      for (int64_t r = 0; r < g.rank; ++r) {
        for (int64_t c = 0; c < count; ++c) sums[c] += u[r] * v[r * g.n + c];
      }
    }
    if (g.bias != nullptr) {
      for (int64_t c = 0; c < count; ++c) sums[c] += g.bias[batch * g.n + col + c];
    }
    if (g.slope.w != nullptr) {
      const float* scale = g.slope.scale + batch * g.slope.scale_size;
      for (int64_t c = 0; c < count; ++c) {
        float w;
        Load(g.slope.w, g.slope.type, (batch * g.m + row) * g.n + col + c, 1, &w);
        const float inverse = 1 / scale[g.slope.scale_size == 1 ? 0 : col + c];
        sums[c] *= SlopeAt(w * inverse, g.slope.k, g.slope.cap);
      }
    }
    Store(sums, count, g.out_type, g.y, (batch * g.m + row) * g.n + col);
  }
};

struct Block {
  int64_t row, col, rows, cols;
};

// Calls work(block) for blocks that cover a matrix.
template <typename Work>
void ForBlocks(int64_t m, int64_t n, int64_t rows, int64_t cols, Pool pool, const Work& work) {
  const int64_t down = (m + rows - 1) / rows, across = (n + cols - 1) / cols;
  ParallelFor(pool, down * across, [&](int64_t i) {
    const int64_t row = i / across * rows, col = i % across * cols;
    work(Block{row, col, std::min(rows, m - row), std::min(cols, n - col)});
  });
}

void MultiplyIntegers(const Operand& a, const Lattice& la, const Operand& b, const Lattice& lb,
                      const Epilogue& epilogue, Pool pool) {
  constexpr int64_t kRows = 64, kCols = 128;
  static_assert(kRows % kIntegerRows == 0 && kCols % kIntegerCols == 0);
  static const IntegerTile tile = ChooseIntegerTile();
  // The instructions want a unsigned: its offset adds a multiple of b's sum.
  const IntegerPanel<uint8_t> pa(a, la, la.max, kIntegerRows, pool);
  const IntegerPanel<int8_t> pb(b, lb, 0, kIntegerCols, pool);
  // A lane takes two products a time, of numbers up to 2 la.max and lb.max; there is room for one.
  const int64_t k = pa.k, exact = kIntegerLanes * (32767 / (2 * 2 * la.max * lb.max));
  const float unit = 1.0f / static_cast<float>(la.factor * lb.factor);
  ForBlocks(a.rows, b.rows, kRows, kCols, pool, [&](const Block& block) {
    int32_t sums[kRows * kCols];
    for (int64_t i = 0; i < block.rows; i += kIntegerRows) {
      for (int64_t j = 0; j < block.cols; j += kIntegerCols) {
        tile(pa.Row(block.row + i), pb.Row(block.col + j), k, exact, sums + i * kCols + j, kCols);
      }
    }
    const int32_t* b_sums = pb.sums.data() + block.col;
    for (int64_t i = 0; i < block.rows; ++i) {
      float y[kCols];
      for (int64_t j = 0; j < block.cols; ++j) {
        y[j] = static_cast<float>(sums[i * kCols + j] - la.max * b_sums[j]) * unit;
      }
      epilogue.Finish(block.row + i, block.col, block.cols, y);
    }
  });
}

// Values of rows [row, row + kWidth) for steps [begin, end) of k, a step after the other.
template <int64_t kWidth>
void PackFloats(const Operand& x, const float* table, int64_t row, int64_t begin, int64_t end,
                float* to) {
  constexpr int64_t kChunk = 256;
  uint8_t bytes[kChunk];
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t p = begin; p < end; p += kChunk) {
      const int64_t count = std::min(kChunk, end - p);
      float* out = to + (p - begin) * kWidth + i;
      if (row + i >= x.rows) {
        for (int64_t q = 0; q < count; ++q) out[q * kWidth] = 0;
        continue;
      }
      x.Read(row + i, p, p + count, bytes);
      for (int64_t q = 0; q < count; ++q) out[q * kWidth] = table[bytes[q]];
    }
  }
}

void MultiplyFloats(const Operand& a, const Operand& b, const Epilogue& epilogue, Pool pool) {
  constexpr int64_t kRows = 96, kCols = 512, kDepth = 256;
  static_assert(kRows % kFloatRows == 0 && kCols % kFloatCols == 0);
  static const FloatTile tile = ChooseFloatTile();
  float ta[256], tb[256];
  for (int i = 0; i < 256; ++i) ta[i] = a.Value(i), tb[i] = b.Value(i);
  const int64_t k = a.k, panels = (b.rows + kFloatCols - 1) / kFloatCols;
  std::vector<float> pb(panels * k * kFloatCols);
  ParallelFor(pool, panels, [&](int64_t panel) {
    PackFloats<kFloatCols>(b, tb, panel * kFloatCols, 0, k, pb.data() + panel * k * kFloatCols);
  });
  ForBlocks(a.rows, b.rows, kRows, kCols, pool, [&](const Block& block) {
    std::vector<float> pa(kRows * kDepth), sums(kRows * kCols);
    for (int64_t p = 0; p < k; p += kDepth) {
      const int64_t depth = std::min(kDepth, k - p);
      for (int64_t i = 0; i < block.rows; i += kFloatRows) {
        PackFloats<kFloatRows>(a, ta, block.row + i, p, p + depth, pa.data() + i * kDepth);
      }
      for (int64_t j = 0; j < block.cols; j += kFloatCols) {
        const float* panel = pb.data() + (block.col + j) * k + p * kFloatCols;
        for (int64_t i = 0; i < block.rows; i += kFloatRows) {
          tile(pa.data() + i * kDepth, panel, depth, sums.data() + i * kCols + j, kCols);
        }
      }
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      epilogue.Finish(block.row + i, block.col, block.cols, sums.data() + i * kCols);
    }
  });
}

}  // namespace

void Multiply(const Gemm& args, Encoding a_encoding, Encoding b_encoding, Pool pool) {
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    Operand a{args.a, a_encoding, args.m, args.k}, b{args.b, b_encoding, args.n, args.k};
    a.data += batch * a.rows * a.row_bytes();
    b.data += batch * b.rows * b.row_bytes();
    const Epilogue epilogue{args, batch};
    Lattice la{}, lb{};
    constexpr int64_t kMaxSum = int64_t{1} << 31;
    const bool e5m2 = a_encoding == Encoding::kE5M2 || b_encoding == Encoding::kE5M2;
    if (!e5m2 && FindLattice(a, pool, la) && FindLattice(b, pool, lb) &&
        args.k * 2 * la.max * lb.max < kMaxSum) {
      MultiplyIntegers(a, la, b, lb, epilogue, pool);
    } else {
      MultiplyFloats(a, b, epilogue, pool);
    }
  }
}

}  // namespace jfp4::host
