// The quantisers on the CPU: the numerics of jfp4/ops/quantize.py and outliers.py, bit for bit.
#include "cuda_ffi/ffi/quantize.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();
constexpr int64_t kTile = 64;

// Subnormals to a zero of the same sign.
JFP4_INLINE float Flush(float v) { return std::fabs(v) < kTiny ? std::copysign(0.0f, v) : v; }

// One matrix, and what is done to its elements before they are scaled.
struct Source {
  const void* x;
  DType type;
  int64_t rows, cols;
  Format format;
  const float* col_factor = nullptr;
  const float* row_factor = nullptr;
  bool clamps = false;  // and compensates
  float lo = 0, hi = 0;

  // Elements [row, col .. col + count): those that are scaled and, if clamped, what they were.
  JFP4_INLINE void Read(int64_t row, int64_t col, int64_t count, float* v, float* wholes) const {
    Load(x, type, row * cols + col, count, v);
    if (col_factor != nullptr) {
      for (int64_t i = 0; i < count; ++i) v[i] *= col_factor[col + i];
    }
    if (row_factor != nullptr) {
      const float factor = row_factor[row];
      for (int64_t i = 0; i < count; ++i) v[i] *= factor;
    }
    if (!clamps) return;
    if (std::isnan(lo) || std::isnan(hi)) {
      std::fill_n(v, count, std::nanf(""));
      return;
    }
    const float low = lo, high = hi;
    for (int64_t i = 0; i < count; ++i) {
      const float whole = Flush(v[i]);
      float clamped = whole < low ? low : whole;
      clamped = clamped > high ? high : clamped;
      // An infinity stays, so that the scale sees it.
      clamped = BitsOf(std::fabs(whole)) == kInfinityBits ? whole : clamped;
      v[i] = clamped;
      wholes[i] = whole;
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
  if (!source.clamps) return;
  source.lo = Flush(outliers.lo[batch]);
  source.hi = Flush(outliers.hi[batch]);
}

// The scale of a slice whose largest magnitude has these bits.
float ScaleOf(int32_t amax_bits, Format format) {
  const FormatSpec& f = Spec(format);
  const float least = kTiny / (f.grid_step / 2);
  const float amax = FromBits(amax_bits);
  if (!(amax < 0x1p126f)) return std::nanf("");
  return std::max(amax * (1 / f.max), least);
}

// Part of a matrix, at most kTile rows by kTile columns.
struct Block {
  int64_t row, col, rows, cols;
};

// The largest magnitudes of a block's rows, in `amax`, or of its columns, as bits: magnitudes
// compare as these do, and a NaN is above all.
JFP4_INLINE void AmaxBody(const Source& s, const Block& block, bool by_row, int32_t* amax) {
  float v[kTile], wholes[kTile];
  for (int64_t r = 0; r < block.rows; ++r) {
    s.Read(block.row + r, block.col, block.cols, v, wholes);
    if (by_row) {
      int32_t largest = amax[r];
      for (int64_t c = 0; c < block.cols; ++c) {
        const int32_t bits = BitsOf(v[c]) & ~kSignBit;
        largest = bits > largest ? bits : largest;
      }
      amax[r] = largest;
    } else {
      for (int64_t c = 0; c < block.cols; ++c) {
        const int32_t bits = BitsOf(v[c]) & ~kSignBit;
        amax[c] = bits > amax[c] ? bits : amax[c];
      }
    }
  }
}

// Codes of a block into `tile`, whose rows are kTile bytes. `inverse` is the reciprocal scale of
// each row or column of the matrix.
template <Format kFormat>
JFP4_INLINE void RoundBody(const Source& s, const Block& block, bool by_row, const float* inverse,
                           uint8_t* tile) {
  const int64_t cols = block.cols;  // for all that the compiler knows, bytes written may be block's
  float v[kTile], wholes[kTile], factor[kTile];
  if (!by_row) std::copy_n(inverse + block.col, cols, factor);
  for (int64_t r = 0; r < block.rows; ++r) {
    s.Read(block.row + r, block.col, cols, v, wholes);
    if (by_row) std::fill_n(factor, cols, inverse[block.row + r]);
    uint8_t* out = tile + r * kTile;
    if (s.clamps) {
      for (int64_t c = 0; c < cols; ++c) {
        const float scaled = Flush(v[c] * factor[c]);
        const float outlier = Flush(Flush(wholes[c] * factor[c]) - scaled);
        // Zeros come out positive, or two negative ones would add up to one.
        const float code = RoundToFormat<kFormat>(scaled) + 0.0f;
        v[c] = RoundToFormat<Format::kE4M3>(code + outlier);
      }
    } else {
      for (int64_t c = 0; c < cols; ++c) v[c] = RoundToFormat<kFormat>(v[c] * factor[c]);
    }
    // A broken row or column has codes 0.
    for (int64_t c = 0; c < cols; ++c) v[c] = factor[c] == factor[c] ? v[c] : 0;
    for (int64_t c = 0; c < cols; ++c) out[c] = ByteOfValue<kFormat>(v[c]);
  }
}

using AmaxFunction = void (*)(const Source&, const Block&, bool, int32_t*);
using RoundFunction = void (*)(const Source&, const Block&, bool, const float*, uint8_t*);

// The two, for the instructions that the machine has.
struct Functions {
  AmaxFunction amax;
  RoundFunction round[6];  // by format
};

template <Format kFormat>
void Round(const Source& s, const Block& block, bool by_row, const float* inverse, uint8_t* tile) {
  RoundBody<kFormat>(s, block, by_row, inverse, tile);
}

void Amax(const Source& s, const Block& block, bool by_row, int32_t* amax) {
  AmaxBody(s, block, by_row, amax);
}

#if defined(__x86_64__) && defined(__GNUC__)

template <Format kFormat>
__attribute__((target("avx2"))) void RoundAvx2(const Source& s, const Block& block, bool by_row,
                                               const float* inverse, uint8_t* tile) {
  RoundBody<kFormat>(s, block, by_row, inverse, tile);
}

__attribute__((target("avx2"))) void AmaxAvx2(const Source& s, const Block& block, bool by_row,
                                              int32_t* amax) {
  AmaxBody(s, block, by_row, amax);
}

#endif

Functions ChooseFunctions() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2")) {
    return {AmaxAvx2,
            {RoundAvx2<Format::kE2M1>, RoundAvx2<Format::kE1M2>, RoundAvx2<Format::kE3M0>,
             RoundAvx2<Format::kE2M1B3>, RoundAvx2<Format::kE4M3>, RoundAvx2<Format::kE5M2>}};
  }
#endif
  return {Amax,
          {Round<Format::kE2M1>, Round<Format::kE1M2>, Round<Format::kE3M0>, Round<Format::kE2M1B3>,
           Round<Format::kE4M3>, Round<Format::kE5M2>}};
}

const Functions& Chosen() {
  static const Functions functions = ChooseFunctions();
  return functions;
}

// Where the codes of a matrix go. A null is not wanted.
struct Outputs {
  uint8_t* codes;
  uint8_t* codes_t;
  uint8_t* packed;    // along the columns
  uint8_t* packed_t;  // along the rows
};

// Bytes of two nibbles, from `length` codes `stride` apart.
void Pack(const uint8_t* codes, int64_t stride, int64_t length, uint8_t* to) {
  for (int64_t i = 0; i < length; i += 2) {
    const uint8_t high = i + 1 < length ? NibbleOf(codes[(i + 1) * stride]) : 0;
    to[i / 2] = NibbleOf(codes[i * stride]) | high << 4;
  }
}

void Write(const uint8_t* tile, const Source& s, const Block& block, const Outputs& out) {
  const auto [row0, col0, rows, cols] = block;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* from = tile + r * kTile;
    const int64_t row = row0 + r;
    if (out.codes) std::copy_n(from, cols, out.codes + row * s.cols + col0);
    if (out.packed) Pack(from, 1, cols, out.packed + row * ((s.cols + 1) / 2) + col0 / 2);
  }
  for (int64_t c = 0; c < cols; ++c) {
    const uint8_t* from = tile + c;
    const int64_t col = col0 + c;
    if (out.codes_t) {
      uint8_t* to = out.codes_t + col * s.rows + row0;
      for (int64_t r = 0; r < rows; ++r) to[r] = from[r * kTile];
    }
    if (out.packed_t) Pack(from, kTile, rows, out.packed_t + col * ((s.rows + 1) / 2) + row0 / 2);
  }
}

// Calls work(begin, end) for the tiles of a length.
template <typename Work>
void ForTiles(int64_t length, const Work& work) {
  for (int64_t i = 0; i < length; i += kTile) work(i, std::min(kTile, length - i));
}

// The largest magnitudes of a matrix's rows or columns, at least `floor` if there is one.
void FindAmax(const Source& s, bool by_row, const float* floor, float* to, ffi::ThreadPool pool) {
  const int64_t slices = by_row ? s.rows : s.cols, length = by_row ? s.cols : s.rows;
  ParallelFor(pool, (slices + kTile - 1) / kTile, [&](int64_t band) {
    const int64_t first = band * kTile, count = std::min(kTile, slices - first);
    int32_t amax[kTile] = {};
    ForTiles(length, [&](int64_t begin, int64_t size) {
      const Block block =
          by_row ? Block{first, begin, count, size} : Block{begin, first, size, count};
      Chosen().amax(s, block, by_row, amax);
    });
    for (int64_t i = 0; i < count; ++i) {
      if (floor != nullptr) amax[i] = std::max<int32_t>(amax[i], BitsOf(floor[first + i]));
      to[first + i] = FromBits(amax[i]);
    }
  });
}

// Scales of a matrix's rows or columns, from their largest magnitudes, and its codes.
void Quantize(const Source& s, bool by_row, const float* amax, float* scale, const Outputs& out,
              ffi::ThreadPool pool) {
  const Functions& f = Chosen();
  const int64_t slices = by_row ? s.rows : s.cols;
  std::vector<float> inverse(slices);
  for (int64_t i = 0; i < slices; ++i) {
    scale[i] = ScaleOf(BitsOf(amax[i]), s.format);
    inverse[i] = 1 / scale[i];
  }
  ParallelFor(pool, (s.rows + kTile - 1) / kTile, [&](int64_t band) {
    const int64_t row = band * kTile, rows = std::min(kTile, s.rows - row);
    uint8_t tile[kTile * kTile];
    ForTiles(s.cols, [&](int64_t col, int64_t cols) {
      const Block block{row, col, rows, cols};
      f.round[static_cast<int>(s.format)](s, block, by_row, inverse.data(), tile);
      Write(tile, s, block, out);
    });
  });
}

template <typename T>
T* At(T* base, int64_t offset) {
  return base == nullptr ? nullptr : base + offset;
}

void RunRows(const QuantizeRows& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    Source source = MakeSource(args.in, args.format, i);
    Clamp(args.outliers, i, source);
    const Outputs out{At(args.codes, i * rows * cols), At(args.codes_t, i * rows * cols),
                      At(args.packed, i * rows * ((cols + 1) / 2)), nullptr};
    float* const scale = args.scale + i * rows;  // the magnitudes' place until they are known
    FindAmax(source, /*by_row=*/true, At(args.amax_floor, i * rows), scale, pool);
    Quantize(source, /*by_row=*/true, scale, scale, out, pool);
  }
}

void RunColumns(const QuantizeColumns& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    Source source = MakeSource(args.in, args.format, i);
    Clamp(args.outliers, i, source);
    const Outputs out{At(args.codes, i * rows * cols), At(args.codes_t, i * rows * cols), nullptr,
                      At(args.packed_t, i * cols * ((rows + 1) / 2))};
    float* const scale = args.scale + i * cols;
    FindAmax(source, /*by_row=*/false, At(args.amax_floor, i * cols), scale, pool);
    Quantize(source, /*by_row=*/false, scale, scale, out, pool);
  }
}

// What is scaled of a gradient: each product's, of its i-th matrix.
template <typename Args>
std::pair<Source, Source> GradientSources(const Args& args, Format format, int64_t i) {
  Source by_row = MakeSource(args.in, format, i), by_column = by_row;
  by_row.col_factor = args.col_factor + i * args.in.cols;
  by_column.row_factor = args.row_factor + i * args.in.rows;
  return {by_row, by_column};
}

void RunGradientAmax(const GradientAmax& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    const auto [by_row, by_column] = GradientSources(args, Format::kE2M1, i);
    FindAmax(by_row, true, nullptr, args.row_amax + i * rows, pool);
    FindAmax(by_column, false, nullptr, args.col_amax + i * cols, pool);
  }
}

void RunGradient(const QuantizeGradient& args, ffi::ThreadPool pool) {
  const int64_t rows = args.in.rows, cols = args.in.cols;
  for (int64_t i = 0; i < args.in.batch; ++i) {
    const auto [by_row, by_column] = GradientSources(args, args.format, i);
    uint8_t* codes = args.codes + i * rows * cols;
    uint8_t* codes_t = args.codes_t + i * rows * cols;
    Quantize(by_row, true, args.row_amax + i * rows, args.row_scale + i * rows,
             {codes, nullptr, nullptr, nullptr}, pool);
    Quantize(by_column, false, args.col_amax + i * cols, args.col_scale + i * cols,
             {nullptr, codes_t, nullptr, nullptr}, pool);
  }
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4QuantizeRowsCpu, jfp4::QuantizeRowsCall, jfp4::host::RunRows);
JFP4_HOST_HANDLER(Jfp4QuantizeColumnsCpu, jfp4::QuantizeColumnsCall, jfp4::host::RunColumns);
JFP4_HOST_HANDLER(Jfp4GradientAmaxCpu, jfp4::GradientAmaxCall, jfp4::host::RunGradientAmax);
JFP4_HOST_HANDLER(Jfp4QuantizeGradientCpu, jfp4::QuantizeGradientCall, jfp4::host::RunGradient);
