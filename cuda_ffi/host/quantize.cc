// The quantisers on the CPU: the numerics of jfp4/ops/quantize.py and outliers.py, bit for bit.
#include "cuda_ffi/ffi/quantize.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();
constexpr int64_t kTile = 64;

// Subnormals to a zero of the same sign.
float Flush(float v) { return std::fabs(v) < kTiny ? std::copysign(0.0f, v) : v; }

// One matrix, and what is done to its elements before they are scaled.
struct Source {
  const void* x;
  DType type;
  int64_t rows, cols;
  Format format;
  const float* col_factor = nullptr;
  const float* row_factor = nullptr;
  bool clamps = false, compensates = false;
  float lo = 0, hi = 0;

  // Elements [row, col .. col + count): those that are scaled, and what was clamped off.
  void Read(int64_t row, int64_t col, int64_t count, float* v, float* residual) const {
    Load(x, type, row * cols + col, count, v);
    if (col_factor != nullptr) {
      for (int64_t i = 0; i < count; ++i) v[i] *= col_factor[col + i];
    }
    if (row_factor != nullptr) {
      for (int64_t i = 0; i < count; ++i) v[i] *= row_factor[row];
    }
    if (!clamps) return;
    for (int64_t i = 0; i < count; ++i) {
      const float whole = Flush(v[i]);
      float clamped = whole < lo ? lo : whole;
      clamped = clamped > hi ? hi : clamped;
      // An infinity stays, so that the scale sees it; NaN thresholds spoil everything.
      clamped = std::isinf(whole) ? whole : clamped;
      v[i] = std::isnan(lo) || std::isnan(hi) ? std::nanf("") : clamped;
      residual[i] = Flush(whole - clamped);
    }
  }
};

Source MakeSource(const QuantizeInput& in, Format format, int64_t batch) {
  const int64_t width = in.type == DType::kF32 ? 4 : 2;
  Source source{};
  source.x = static_cast<const char*>(in.x) + batch * in.rows * in.cols * width;
  source.type = in.type;
  source.rows = in.rows;
  source.cols = in.cols;
  source.format = format;
  return source;
}

void Clamp(const Outliers& outliers, int64_t batch, Source& source) {
  source.clamps = outliers.lo != nullptr;
  source.compensates = outliers.compensate;
  if (!source.clamps) return;
  source.lo = Flush(outliers.lo[batch]);
  source.hi = Flush(outliers.hi[batch]);
}

// Magnitudes compare as their bits do, and a NaN is above all.
uint32_t Magnitude(float v) { return BitsOf(v) & ~kSignBit; }

// The scale of a slice whose largest magnitude has these bits.
float ScaleOf(uint32_t amax_bits, Format format) {
  const FormatSpec& f = Spec(format);
  const float least = kTiny / (f.grid_step / 2);
  const float amax = FromBits(amax_bits);
  if (!(amax < 0x1p127f)) return std::nanf("");
  return std::max(amax * (1 / f.max), least);
}

// Where the codes of a tile go. A null is not wanted.
struct Outputs {
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed;    // along the columns
  uint8_t* packed_t;  // along the rows
};

template <Format kFormat>
void RoundTile(const Source& s, const float* inverse, bool by_row, int64_t r0, int64_t c0,
               int64_t rows, int64_t cols, uint8_t* tile) {
  float v[kTile], residual[kTile];
  for (int64_t r = 0; r < rows; ++r) {
    s.Read(r0 + r, c0, cols, v, residual);
    uint8_t* out = tile + r * kTile;
    for (int64_t c = 0; c < cols; ++c) {
      const float factor = by_row ? inverse[r0 + r] : inverse[c0 + c];
      uint8_t code = CodeByte<kFormat>(v[c] * factor);
      if (s.compensates) {
        const float sum = CodeValue(code, false) + Flush(residual[c] * factor);
        code = CodeByte<Format::kE4M3>(sum);
      }
      out[c] = std::isnan(factor) ? 0 : code;
    }
  }
}

using Rounder = void (*)(const Source&, const float*, bool, int64_t, int64_t, int64_t, int64_t,
                         uint8_t*);
constexpr Rounder kRounders[] = {RoundTile<Format::kE2M1>, RoundTile<Format::kE1M2>,
                                 RoundTile<Format::kE3M0>, RoundTile<Format::kE4M3>,
                                 RoundTile<Format::kE5M2>};

// Bytes of two nibbles, from `length` codes `stride` apart.
void Pack(const uint8_t* codes, int64_t stride, int64_t length, uint8_t* to) {
  for (int64_t i = 0; i < length; i += 2) {
    const uint8_t high = i + 1 < length ? NibbleOf(codes[(i + 1) * stride]) : 0;
    to[i / 2] = NibbleOf(codes[i * stride]) | high << 4;
  }
}

// Rounds a matrix with the scales of its rows or columns, a tile at a time.
void Round(const Source& s, const float* scale, bool by_row, const Outputs& out,
           ffi::ThreadPool pool) {
  std::vector<float> inverse(by_row ? s.rows : s.cols);
  for (size_t i = 0; i < inverse.size(); ++i) inverse[i] = 1 / scale[i];
  const int64_t tiles = (s.cols + kTile - 1) / kTile;
  ParallelFor(pool, (s.rows + kTile - 1) / kTile, [&](int64_t band) {
    uint8_t tile[kTile * kTile];
    const int64_t r0 = band * kTile, rows = std::min(kTile, s.rows - r0);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t c0 = t * kTile, cols = std::min(kTile, s.cols - c0);
      kRounders[static_cast<int>(s.format)](s, inverse.data(), by_row, r0, c0, rows, cols, tile);
      for (int64_t r = 0; r < rows; ++r) {
        if (out.codes) std::copy_n(tile + r * kTile, cols, out.codes + (r0 + r) * s.cols + c0);
        if (out.packed) {
          Pack(tile + r * kTile, 1, cols, out.packed + (r0 + r) * ((s.cols + 1) / 2) + c0 / 2);
        }
      }
      for (int64_t c = 0; c < cols; ++c) {
        if (out.codes_t) {
          uint8_t* to = out.codes_t + (c0 + c) * s.rows + r0;
          for (int64_t r = 0; r < rows; ++r) to[r] = tile[r * kTile + c];
        }
        if (out.packed_t) {
          Pack(tile + c, kTile, rows, out.packed_t + (c0 + c) * ((s.rows + 1) / 2) + r0 / 2);
        }
      }
    }
  });
}

void ScaleRows(const Source& s, float* scale, ffi::ThreadPool pool) {
  ParallelFor(pool, (s.rows + kTile - 1) / kTile, [&](int64_t band) {
    float v[kTile], residual[kTile];
    for (int64_t r = band * kTile; r < std::min(s.rows, (band + 1) * kTile); ++r) {
      uint32_t amax = 0;
      for (int64_t c = 0; c < s.cols; c += kTile) {
        const int64_t count = std::min(kTile, s.cols - c);
        s.Read(r, c, count, v, residual);
        for (int64_t i = 0; i < count; ++i) amax = std::max(amax, Magnitude(v[i]));
      }
      scale[r] = ScaleOf(amax, s.format);
    }
  });
}

void ScaleColumns(const Source& s, float* scale, ffi::ThreadPool pool) {
  ParallelFor(pool, (s.cols + kTile - 1) / kTile, [&](int64_t band) {
    float v[kTile], residual[kTile];
    uint32_t amax[kTile] = {};
    const int64_t c0 = band * kTile, count = std::min(kTile, s.cols - c0);
    for (int64_t r = 0; r < s.rows; ++r) {
      s.Read(r, c0, count, v, residual);
      for (int64_t i = 0; i < count; ++i) amax[i] = std::max(amax[i], Magnitude(v[i]));
    }
    for (int64_t i = 0; i < count; ++i) scale[c0 + i] = ScaleOf(amax[i], s.format);
  });
}

uint8_t* At(uint8_t* base, int64_t offset) { return base == nullptr ? nullptr : base + offset; }

void RunRows(const QuantizeRows& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    Source source = MakeSource(args.in, args.format, i);
    Clamp(args.outliers, i, source);
    float* scale = args.scale + i * rows;
    ScaleRows(source, scale, pool);
    const Outputs out{At(args.codes, i * rows * cols), At(args.codes_t, i * rows * cols),
                      At(args.packed, i * rows * ((cols + 1) / 2)), nullptr};
    Round(source, scale, /*by_row=*/true, out, pool);
  }
}

void RunColumns(const QuantizeColumns& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    Source source = MakeSource(args.in, args.format, i);
    Clamp(args.outliers, i, source);
    float* scale = args.scale + i * cols;
    ScaleColumns(source, scale, pool);
    const Outputs out{At(args.codes, i * rows * cols), At(args.codes_t, i * rows * cols), nullptr,
                      At(args.packed_t, i * cols * ((rows + 1) / 2))};
    Round(source, scale, /*by_row=*/false, out, pool);
  }
}

void RunGradient(const QuantizeGradient& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    Source by_row = MakeSource(args.in, args.format, i);
    by_row.col_factor = args.col_factor + i * cols;
    float* row_scale = args.row_scale + i * rows;
    ScaleRows(by_row, row_scale, pool);
    Round(by_row, row_scale, true, {args.codes + i * rows * cols, nullptr, nullptr, nullptr}, pool);
    Source by_column = MakeSource(args.in, args.format, i);
    by_column.row_factor = args.row_factor + i * rows;
    float* col_scale = args.col_scale + i * cols;
    ScaleColumns(by_column, col_scale, pool);
    Round(by_column, col_scale, false, {nullptr, args.codes_t + i * rows * cols, nullptr, nullptr},
          pool);
  }
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4QuantizeRowsCpu, jfp4::QuantizeRowsCall, jfp4::host::RunRows);
JFP4_HOST_HANDLER(Jfp4QuantizeColumnsCpu, jfp4::QuantizeColumnsCall, jfp4::host::RunColumns);
JFP4_HOST_HANDLER(Jfp4QuantizeGradientCpu, jfp4::QuantizeGradientCall, jfp4::host::RunGradient);
