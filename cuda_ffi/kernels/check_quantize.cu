// Checks every byte that the quantising kernels write against plain C++ on the host, and times
// them.
//
//   cmake -S . -B build && cmake --build build --target check_quantize
//   build/check_quantize          # correctness; small enough for compute-sanitizer
//   build/check_quantize REGEX    # of the groups so named: racecheck does not take all at once
//   build/check_quantize bench    # times
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <random>
#include <regex>
#include <string>
#include <vector>

#include "cuda_ffi/kernels/quantize.h"
#include "cuda_ffi/kernels/thresholds.h"

namespace jfp4 {
namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

constexpr DType kTypes[] = {DType::kBF16, DType::kF16, DType::kF32};
constexpr Format kFormats[] = {Format::kE2M1,   Format::kE1M2, Format::kE3M0,
                               Format::kE2M1B3, Format::kE4M3, Format::kE5M2};
const char* const kTypeNames[] = {"bf16", "f16", "f32"};
const char* const kFormatNames[] = {"e2m1", "e1m2", "e3m0", "e2m1b3", "e4m3", "e5m2"};

const char* Name(DType type) { return kTypeNames[static_cast<int>(type)]; }
const char* Name(Format format) { return kFormatNames[static_cast<int>(format)]; }
int Size(DType type) { return type == DType::kF32 ? 4 : 2; }

// --- the reference ---

uint32_t BitsOf(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

float FloatOf(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// The non-negative values of each format, ascending.
const std::vector<double>& Grid(Format format) {
  static const std::vector<std::vector<double>> grids = [] {
    std::vector<std::vector<double>> result;
    struct {
      int mantissa_bits, min_exponent;
      double max;
    } const definitions[] = {{1, 0, 6},    {2, 1, 3.5},  {0, -2, 16},
                             {1, -2, 1.5}, {3, -6, 448}, {2, -14, 57344}};
    for (const auto& d : definitions) {
      std::vector<double> grid = {0};
      while (grid.back() < d.max) {
        const int exponent = grid.back() > 0 ? std::ilogb(grid.back()) : d.min_exponent;
        grid.push_back(grid.back() +
                       std::ldexp(1, std::max(exponent, d.min_exponent) - d.mantissa_bits));
      }
      result.push_back(grid);
    }
    return result;
  }();
  return grids[static_cast<int>(format)];
}

// The index of the grid value nearest to |v|, ties to the even index, saturating.
int Round(float v, Format format) {
  const std::vector<double>& grid = Grid(format);
  const double magnitude = std::fabs(static_cast<double>(v));
  const int above = std::lower_bound(grid.begin(), grid.end(), magnitude) - grid.begin();
  if (above == 0) return 0;
  if (above == static_cast<int>(grid.size())) return above - 1;
  const double middle = (grid[above - 1] + grid[above]) / 2;  // exact
  if (magnitude == middle) return above % 2 == 0 ? above : above - 1;
  return magnitude > middle ? above : above - 1;
}

// The byte of an index and a sign: E5M2 and E4M3 number their values as bytes do.
uint8_t Byte(int index, bool negative, Format format) {
  if (format < Format::kE4M3) {
    const std::vector<double>& carrier = Grid(Format::kE4M3);
    const double value = Grid(format)[index];
    index = std::lower_bound(carrier.begin(), carrier.end(), value) - carrier.begin();
  }
  return static_cast<uint8_t>(index | (negative ? 0x80 : 0));
}

float Flush(float v) { return std::fabs(v) < std::ldexp(1.0f, -126) ? 0.0f : v; }

struct Clipping {
  const float* lo = nullptr;
  const float* hi = nullptr;
};

// The larger and the smaller of two numbers, -0 being less than +0.
float Larger(float a, float b) { return a > b || (a == b && std::signbit(b)) ? a : b; }
float Smaller(float a, float b) { return a < b || (a == b && std::signbit(a)) ? a : b; }

float Clip(float v, const Clipping& clip) {
  if (clip.lo == nullptr || std::isinf(v)) return v;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (std::isnan(v) || std::isnan(*clip.lo) || std::isnan(*clip.hi)) return nan;
  return Smaller(Larger(v, *clip.lo), *clip.hi);
}

// A slice: `n` elements `stride` apart, whose largest magnitude is taken to be at least `floor`.
void QuantizeSlice(const float* x, int64_t n, int64_t stride, Format format, const Clipping& clip,
                   float floor, uint8_t* codes, float* scale) {
  float amax = floor;
  for (int64_t i = 0; i < n && !std::isnan(amax); ++i) {
    const float magnitude = std::fabs(Clip(x[i * stride], clip));
    if (!(magnitude <= amax)) amax = magnitude;
  }
  const float inverse_max = static_cast<float>(1 / Grid(format).back());
  const float least = static_cast<float>(std::ldexp(1.0, -126) / (Grid(format)[1] / 2));
  const float product = amax * inverse_max;
  *scale = amax < std::ldexp(1.0f, 126) ? std::max(product, least) : FloatOf(0x7FC00000);
  const float inverse = 1 / *scale;
  for (int64_t i = 0; i < n; ++i) {
    uint8_t& code = codes[i * stride];
    code = 0;
    if (std::isnan(*scale)) continue;
    if (clip.lo == nullptr) {
      const float v = x[i * stride] * inverse;
      code = Byte(Round(v, format), std::signbit(v), format);
      continue;
    }
    const auto scaled = [&](float a) { return Flush(Flush(a) * inverse); };
    const float u = scaled(x[i * stride]), low = scaled(*clip.lo), high = scaled(*clip.hi);
    const float v = std::min(std::max(u, low), high);
    const float magnitude = static_cast<float>(Grid(format)[Round(v, format)]);
    const float sum = (v < 0 ? -magnitude : magnitude) + Flush(u - v);
    code = Byte(Round(sum, Format::kE4M3), std::signbit(sum), Format::kE4M3);
  }
}

// [rows, cols] at a time; a scale a row or a column. No floors are zeros.
void Quantize(const Floats& x, int64_t batch, int64_t rows, int64_t cols, bool by_row,
              Format format, const Floats& lo, const Floats& hi, const Floats& floors, Bytes* codes,
              Floats* scale) {
  codes->assign(batch * rows * cols, 0);
  scale->assign(batch * (by_row ? rows : cols), 0);
  for (int64_t b = 0; b < batch; ++b) {
    const Clipping clip = {lo.empty() ? nullptr : &lo[b], hi.empty() ? nullptr : &hi[b]};
    const float* from = x.data() + b * rows * cols;
    uint8_t* to = codes->data() + b * rows * cols;
    const int64_t slices = by_row ? rows : cols;
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t slice = b * slices + i;
      const float floor = floors.empty() ? 0 : floors[slice];
      if (by_row) {
        QuantizeSlice(from + i * cols, cols, 1, format, clip, floor, to + i * cols,
                      &(*scale)[slice]);
      } else {
        QuantizeSlice(from + i, rows, cols, format, clip, floor, to + i, &(*scale)[slice]);
      }
    }
  }
}

Bytes Transpose(const Bytes& codes, int64_t batch, int64_t rows, int64_t cols) {
  Bytes result(codes.size());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        result[(b * cols + c) * rows + r] = codes[(b * rows + r) * cols + c];
      }
    }
  }
  return result;
}

Bytes Pack(const Bytes& codes, int64_t rows, int64_t cols) {
  constexpr uint8_t kBytes[] = {0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C};
  const auto nibble = [&](uint8_t byte) {
    const int index = std::find(kBytes, kBytes + 8, byte & 0x7F) - kBytes;
    return index | (byte >> 7 << 3);
  };
  const int64_t width = (cols + 1) / 2;
  Bytes result(rows * width, 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      result[r * width + c / 2] |= nibble(codes[r * cols + c]) << (c % 2 * 4);
    }
  }
  return result;
}

Bytes BytesOf(const Floats& v) {
  Bytes result(v.size() * sizeof(float));
  if (!v.empty()) std::memcpy(result.data(), v.data(), result.size());
  return result;
}

// --- tensors ---

uint16_t ToBF16(float v) {
  const uint32_t bits = BitsOf(v);
  if (std::isnan(v)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A tensor as stored, and the values that are left of it.
struct Tensor {
  Bytes stored;
  Floats values;
};

Tensor Store(const Floats& values, DType type) {
  Tensor tensor = {Bytes(values.size() * Size(type)), values};
  for (size_t i = 0; i < values.size(); ++i) {
    uint8_t* to = &tensor.stored[i * Size(type)];
    if (type == DType::kF32) {
      std::memcpy(to, &values[i], 4);
    } else if (type == DType::kBF16) {
      const uint16_t bits = ToBF16(values[i]);
      std::memcpy(to, &bits, 2);
      tensor.values[i] = FloatOf(static_cast<uint32_t>(bits) << 16);
    } else {
      const __half half = __float2half_rn(values[i]);
      std::memcpy(to, &half, 2);
      tensor.values[i] = __half2float(half);
    }
  }
  return tensor;
}

// Normal values, 1% of them times 20, and, if wanted, every kind of row, column and element that
// could go wrong.
Floats MakeValues(int64_t rows, int64_t cols, bool special, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> percent(0, 99);
  Floats x(rows * cols);
  for (float& v : x) v = normal(rng) * (percent(rng) == 0 ? 20.0f : 1.0f);
  if (!special || x.empty()) return x;
  const float kInfinity = std::numeric_limits<float>::infinity();
  const auto row = [&](int64_t r, const std::function<float(float)>& f) {
    if (r >= rows) return;
    for (int64_t c = 0; c < cols; ++c) x[r * cols + c] = f(x[r * cols + c]);
  };
  const auto column = [&](int64_t c, const std::function<float(float)>& f) {
    if (c >= cols) return;
    for (int64_t r = 0; r < rows; ++r) x[r * cols + c] = f(x[r * cols + c]);
  };
  row(1, [](float) { return 0.0f; });
  row(2, [](float) { return -0.0f; });
  row(3, [](float v) { return v * 1e-39f; });
  row(4, [](float v) { return v * 1e-38f; });
  row(5, [](float v) { return v * 2e37f; });
  row(6, [](float v) { return v * 1e-7f; });
  row(7, [](float v) { return std::round(v * 4) / 4; });  // ties
  row(8, [=](float v) { return v < 0 ? -kInfinity : kInfinity; });
  row(9, [](float v) { return std::fabs(v); });
  row(10, [](float v) { return -std::fabs(v) - 3; });
  row(11, [](float) { return 6.0f; });
  column(33, [](float) { return 0.0f; });
  column(34, [](float v) { return v * 1e-39f; });
  column(35, [](float v) { return std::round(v * 4) / 4; });
  const auto element = [&](int64_t r, int64_t c, float v) {
    if (r < rows && c < cols) x[r * cols + c] = v;
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  element(12, 40, nan);
  element(13, 41, kInfinity);
  element(14, 42, -kInfinity);
  element(15, 43, -nan);
  element(16, 44, 3e38f);
  element(17, 45, -0.0f);
  element(18, 46, 1.7e38f);
  element(19, 47, 1e-45f);
  element(20, 48, -1e-40f);
  return x;
}

// Device memory between two walls, which must still stand when it is read back.
class Buffer {
 public:
  static constexpr int kWall = 256;
  static constexpr uint8_t kPoison = 0xA5;

  Buffer(int64_t bytes, bool aligned = true) : bytes_(bytes), start_(kWall + (aligned ? 0 : 4)) {
    Check(cudaMalloc(&memory_, bytes + 2 * kWall + 4), "cudaMalloc");
    Poison();
  }
  explicit Buffer(const Bytes& data, bool aligned = true) : Buffer(data.size(), aligned) {
    Check(cudaMemcpy(memory_ + start_, data.data(), data.size(), cudaMemcpyHostToDevice), "upload");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(memory_); }

  void Poison() const { Check(cudaMemset(memory_, kPoison, bytes_ + 2 * kWall + 4), "cudaMemset"); }

  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(memory_ + start_);
  }

  Bytes Read(bool* intact) const {
    Bytes all(bytes_ + 2 * kWall + 4);
    Check(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost), "download");
    *intact = true;
    for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i) {
      if ((i < start_ || i >= start_ + bytes_) && all[i] != kPoison) *intact = false;
    }
    return Bytes(all.begin() + start_, all.begin() + start_ + bytes_);
  }

 private:
  uint8_t* memory_;
  int64_t bytes_, start_;
};

// --- checks ---

// Gathers a group of checks, to print as one line.
class Group {
 public:
  explicit Group(std::string name) : name_(std::move(name)) {}
  ~Group() {
    if (mismatch_.empty()) {
      std::printf("%-32s ok, %d outputs\n", name_.c_str(), checks_);
    } else {
      std::printf("%-32s MISMATCH in %d of %d outputs; first: %s\n", name_.c_str(), failures_,
                  checks_, mismatch_.c_str());
      ++failed_groups;
    }
    std::fflush(stdout);
  }

  void Expect(const Buffer& buffer, const Bytes& want, const std::string& what, int width = 1) {
    bool intact;
    const Bytes got = buffer.Read(&intact);
    ++checks_;
    size_t i = 0;
    while (i < want.size() && got[i] == want[i]) ++i;
    if (i == want.size() && intact) return;
    ++failures_;
    if (!mismatch_.empty()) return;
    if (i == want.size()) {
      mismatch_ = what + ", written out of bounds";
      return;
    }
    int64_t differing = 0;
    for (size_t j = 0; j < want.size(); ++j) differing += got[j] != want[j];
    i = i / width * width;
    uint32_t got_value = 0, want_value = 0;
    std::memcpy(&got_value, &got[i], width);
    std::memcpy(&want_value, &want[i], width);
    char text[256];
    std::snprintf(text, sizeof(text), "%s, index %zu of %zu, got %#x, want %#x, %lld bytes differ",
                  what.c_str(), i / width, want.size() / width, got_value, want_value,
                  static_cast<long long>(differing));
    mismatch_ = text;
  }

  static int failed_groups;

 private:
  std::string name_, mismatch_;
  int checks_ = 0, failures_ = 0;
};
int Group::failed_groups = 0;

struct Shape {
  int64_t batch, rows, cols;
  bool aligned = true;
};

std::string Text(const Shape& s) {
  return std::to_string(s.batch) + "x" + std::to_string(s.rows) + "x" + std::to_string(s.cols) +
         (s.aligned ? "" : " unaligned");
}

std::vector<Shape> SmallShapes() {
  return {{1, 1, 1},           {1, 1, 512}, {2, 127, 129}, {1, 129, 127}, {1, 32, 512},
          {2, 48, 1024},       {2, 16, 64}, {1, 129, 520}, {2, 144, 264}, {1, 64, 2056},
          {1, 32, 128, false}, {2, 33, 1},  {1, 0, 8},     {2, 5, 0},     {0, 4, 8}};
}

std::vector<Shape> LargeShapes() {
  return {{1, 127, 5119}, {1, 5119, 127}, {1, 512, 5120}, {1, 48, 13824},
          {1, 16, 11008}, {1, 16, 32768}, {1, 16, 33024}, {1, 2, 40000},
          {1, 5120, 264}, {2, 160, 4096}, {20, 14400, 8}};
}

// Thresholds in turn: usual ones, some that everything or nothing is beyond, NaN, subnormal,
// crossed, zeros, tiny.
void MakeLimits(int64_t batch, int kind, Floats* lo, Floats* hi) {
  const float kInfinity = std::numeric_limits<float>::infinity();
  const float limits[][2] = {{-2.25f, 2.5f},          {-1.1f, 1.7f},    {0.5f, 1.0f},
                             {-kInfinity, kInfinity}, {-1.0f, NAN},     {-3e-39f, 2e-38f},
                             {1.0f, -1.0f},           {0.0f, 0.0f},     {-0.0f, 1.0f},
                             {-1.0f, -0.0f},          {2e-38f, 3e-38f}, {-3e-38f, -2e-38f}};
  for (int64_t b = 0; b < batch; ++b) {
    const auto& pair = limits[(kind + b) % (sizeof(limits) / sizeof(limits[0]))];
    lo->push_back(pair[0]);
    hi->push_back(pair[1]);
  }
}

// Floors of the largest magnitudes: for every other kind, of every sort in turn.
Floats MakeFloors(int64_t count, int kind) {
  if (kind % 2 == 0) return {};
  const float kInfinity = std::numeric_limits<float>::infinity();
  const float floors[] = {0, 2.5f, 100, 0, 1e-40f, 1e30f, 0, kInfinity, 3e38f, 1, NAN};
  Floats result;
  for (int64_t i = 0; i < count; ++i) result.push_back(floors[(i + kind) % std::size(floors)]);
  return result;
}

struct Setting {
  DType type;
  Format format;
  bool clips;  // and compensates
};

std::string Text(const Setting& s) {
  return std::string(Name(s.type)) + " " + Name(s.format) + (s.clips ? " compensate" : "");
}

// Codes and scales of one axis, compared in every combination of outputs.
void CheckRowsOrColumns(Group* group, const Setting& s, const Shape& shape, bool by_row, int kind,
                        std::mt19937& rng) {
  const auto [batch, rows, cols, aligned] = shape;
  Floats values;
  for (int64_t b = 0; b < batch; ++b) {
    const Floats matrix = MakeValues(rows, cols, kind % 3 != 2, rng);
    values.insert(values.end(), matrix.begin(), matrix.end());
  }
  const Tensor x = Store(values, s.type);
  Floats lo, hi;
  if (s.clips) MakeLimits(batch, kind, &lo, &hi);
  Bytes codes;
  Floats scale;
  const Floats floors = MakeFloors(batch * (by_row ? rows : cols), kind);
  Quantize(x.values, batch, rows, cols, by_row, s.format, lo, hi, floors, &codes, &scale);
  const Bytes codes_t = Transpose(codes, batch, rows, cols);
  const bool packs = s.format == Format::kE2M1 && !s.clips;
  const Bytes packed = !packs   ? Bytes()
                       : by_row ? Pack(codes, batch * rows, cols)
                                : Pack(codes_t, batch * cols, rows);

  const Buffer x_buffer(x.stored, aligned), lo_buffer(BytesOf(lo)), hi_buffer(BytesOf(hi));
  const Buffer floors_buffer(BytesOf(floors));
  const float* const amax_floor = floors.empty() ? nullptr : floors_buffer.As<float>();
  const QuantizeInput in = {x_buffer.As<void>(), s.type, batch, rows, cols};
  Outliers outliers;
  if (s.clips) outliers = {lo_buffer.As<float>(), hi_buffer.As<float>()};
  for (int outputs = 0; outputs < (packs ? 8 : 4); ++outputs) {
    const Buffer codes_buffer(codes.size(), aligned), codes_t_buffer(codes_t.size(), aligned);
    const Buffer packed_buffer(packed.size(), aligned), scale_buffer(scale.size() * 4);
    const Buffer amax(batch * cols * 4);
    uint8_t* const codes_out = outputs & 1 ? codes_buffer.As<uint8_t>() : nullptr;
    uint8_t* const codes_t_out = outputs & 2 ? codes_t_buffer.As<uint8_t>() : nullptr;
    uint8_t* const packed_out = outputs & 4 ? packed_buffer.As<uint8_t>() : nullptr;
    cudaError_t error;
    if (by_row) {
      error = LaunchQuantizeRows({in, outliers, s.format, codes_out, codes_t_out, packed_out,
                                  scale_buffer.As<float>(), amax_floor},
                                 nullptr);
    } else {
      error = LaunchQuantizeColumns({in, outliers, s.format, codes_out, codes_t_out, packed_out,
                                     scale_buffer.As<float>(), amax.As<float>(), amax_floor},
                                    nullptr);
    }
    Check(error, "launch");
    Check(cudaDeviceSynchronize(), "kernel");
    const std::string what = Text(s) + " " + Text(shape) + " outputs " + std::to_string(outputs);
    group->Expect(scale_buffer, BytesOf(scale), what + " scale", 4);
    if (outputs & 1) group->Expect(codes_buffer, codes, what + " codes");
    if (outputs & 2) group->Expect(codes_t_buffer, codes_t, what + " codes_t");
    if (outputs & 4) group->Expect(packed_buffer, packed, what + " packed");
  }
}

void CheckGradient(Group* group, const Setting& s, const Shape& shape, int kind,
                   std::mt19937& rng) {
  const auto [batch, rows, cols, aligned] = shape;
  Floats values;
  for (int64_t b = 0; b < batch; ++b) {
    const Floats matrix = MakeValues(rows, cols, kind % 3 != 2, rng);
    values.insert(values.end(), matrix.begin(), matrix.end());
  }
  const Tensor x = Store(values, s.type);
  Floats row_factor(batch * rows), col_factor(batch * cols);
  std::uniform_real_distribution<float> uniform(0.001f, 0.1f);
  for (float& f : row_factor) f = uniform(rng);
  for (float& f : col_factor) f = uniform(rng);
  if (!row_factor.empty() && kind % 5 == 1) row_factor.back() = NAN;
  if (!col_factor.empty() && kind % 5 == 2) col_factor.back() = NAN;

  Floats by_row = x.values, by_col = x.values;
  for (size_t i = 0; i < by_row.size(); ++i) {
    const int64_t b = i / (rows * cols), r = i / cols, c = i % cols + b * cols;
    by_row[i] *= col_factor[c];
    by_col[i] *= row_factor[r];
  }
  Bytes codes, col_codes;
  Floats row_scale, col_scale;
  // Of the rows, of the columns, of both, of neither.
  const Floats row_floors = MakeFloors(batch * rows, kind),
               col_floors = MakeFloors(batch * cols, kind / 2);
  Quantize(by_row, batch, rows, cols, true, s.format, {}, {}, row_floors, &codes, &row_scale);
  Quantize(by_col, batch, rows, cols, false, s.format, {}, {}, col_floors, &col_codes, &col_scale);
  const Bytes codes_t = Transpose(col_codes, batch, rows, cols);

  const Buffer x_buffer(x.stored, aligned);
  const Buffer row_factor_buffer(BytesOf(row_factor)), col_factor_buffer(BytesOf(col_factor));
  const Buffer codes_buffer(codes.size(), aligned), codes_t_buffer(codes_t.size(), aligned);
  const Buffer row_scale_buffer(row_scale.size() * 4), col_scale_buffer(col_scale.size() * 4);
  const Buffer own_row_amax(row_scale.size() * 4), own_col_amax(col_scale.size() * 4);
  const Buffer counters(batch * kCounterWords * 4);
  const QuantizeInput in = {x_buffer.As<void>(), s.type, batch, rows, cols};
  // A second time with the counters as the first has left them.
  for (int i = 0; i < 2; ++i) {
    own_row_amax.Poison();
    own_col_amax.Poison();
    Check(LaunchGradientAmax(
              {in, col_factor_buffer.As<float>(), row_factor_buffer.As<float>(),
               own_row_amax.As<float>(), own_col_amax.As<float>(), counters.As<TileCounter>()},
              nullptr),
          "launch");
  }
  Check(cudaDeviceSynchronize(), "kernel");
  const auto raised = [&](const Buffer& own, const Floats& floors, const char* of) {
    bool intact;
    Bytes amax = own.Read(&intact);
    group->Expect(own, amax, Text(s) + " " + Text(shape) + of, 4);  // its walls
    for (size_t i = 0; i < floors.size(); ++i) {
      uint32_t found, least;  // a NaN is the largest
      std::memcpy(&found, amax.data() + 4 * i, 4);
      std::memcpy(&least, &floors[i], 4);
      found = std::max(found, least);
      std::memcpy(amax.data() + 4 * i, &found, 4);
    }
    return amax;
  };
  const Buffer row_amax(raised(own_row_amax, row_floors, " row_amax"));
  const Buffer col_amax(raised(own_col_amax, col_floors, " col_amax"));
  Check(LaunchQuantizeGradient(
            {in, s.format, col_factor_buffer.As<float>(), row_factor_buffer.As<float>(),
             row_amax.As<float>(), col_amax.As<float>(), codes_buffer.As<uint8_t>(),
             row_scale_buffer.As<float>(), codes_t_buffer.As<uint8_t>(),
             col_scale_buffer.As<float>()},
            nullptr),
        "launch");
  Check(cudaDeviceSynchronize(), "kernel");
  const std::string what = Text(s) + " " + Text(shape);
  group->Expect(row_scale_buffer, BytesOf(row_scale), what + " row_scale", 4);
  group->Expect(codes_buffer, codes, what + " codes");
  group->Expect(col_scale_buffer, BytesOf(col_scale), what + " col_scale", 4);
  group->Expect(codes_t_buffer, codes_t, what + " codes_t");
}

// An outlier whose product with the reciprocal of the scale is below 2^-126 but rounds to it: it is
// not flushed, and leaves a negative zero.
void CheckFlushEdge() {
  Group group("flush at the edge");
  for (int i = 1; i < 4096; ++i) {
    const float r = 1 + i / 4096.0f, inverse = 1 / r, inverse_max = 1.0f / 6;
    const double product = static_cast<double>(r) * inverse;
    if (product >= 1 || product < 1 - std::ldexp(1.0, -24) || 6 * r * inverse_max != r) continue;
    const float lo = -std::ldexp(1.0f, -120), beyond = lo - std::ldexp(r, -126);
    Floats x(64, beyond);
    x[0] = 6 * r;
    Bytes codes;
    Floats scale;
    Quantize(x, 1, 1, 64, true, Format::kE2M1, {lo}, {1e30f}, {}, &codes, &scale);
    const Buffer x_buffer(BytesOf(x)), lo_buffer(BytesOf({lo})), hi_buffer(BytesOf({1e30f}));
    const Buffer codes_buffer(64), scale_buffer(4);
    Check(LaunchQuantizeRows({{x_buffer.As<void>(), DType::kF32, 1, 1, 64},
                              {lo_buffer.As<float>(), hi_buffer.As<float>()},
                              Format::kE2M1,
                              codes_buffer.As<uint8_t>(),
                              nullptr,
                              nullptr,
                              scale_buffer.As<float>()},
                             nullptr),
          "launch");
    group.Expect(codes_buffer, codes, "r = " + std::to_string(r));
    if (i > 600) break;
  }
}

// Large samples have a group of their own: a checker of races takes minutes for each.
std::string ThresholdsText(DType type, bool large) {
  return std::string("thresholds ") + Name(type) + (large ? " large" : "");
}

void CheckThresholds(DType type, bool large, std::mt19937& rng) {
  constexpr int64_t kLarge = 10000;
  Group group(ThresholdsText(type, large));
  struct {
    int64_t batch, size, stride, count;
    int kind;  // normal, constant, zeros of both signs, one NaN, heavy tails
  } const cases[] = {{1, 1, 1, 1, 0},          {2, 100, 1, 100, 0},     {2, 100, 3, 34, 2},
                     {1, 65536, 1, 65536, 0},  {2, 70000, 1, 70000, 4}, {1, 70000, 1, 65537, 3},
                     {1, 300000, 7, 42857, 4}, {2, 9000, 1, 9000, 1},   {2, 262145, 3, 65536, 3},
                     {1, 200000, 1, 200000, 0}};
  for (const auto& c : cases) {
    if ((c.size > kLarge) != large) continue;
    Floats values(c.batch * c.size);
    std::normal_distribution<float> normal;
    for (float& v : values) {
      v = normal(rng);
      if (c.kind == 1) v = -1.5f;
      if (c.kind == 2) v = v < 0 ? -0.0f : 0.0f;
      if (c.kind == 4) v = std::copysign(std::exp(3 * v), normal(rng));
    }
    if (c.kind == 4) values[0] = -std::numeric_limits<float>::infinity();
    if (c.kind == 3) values[c.stride * (c.count - 1)] = -NAN;  // of the first tensor
    const Tensor x = Store(values, type);
    const Buffer x_buffer(x.stored);
    for (const double alpha : {0.99, 0.9, 0.6, 1.0}) {
      const int64_t high =
          std::clamp<int64_t>(std::ceil(alpha * c.count - 1e-9) - 1, 0, c.count - 1);
      const int64_t low = c.count - 1 - high;
      Floats lo, hi;
      for (int64_t b = 0; b < c.batch; ++b) {
        Floats sample;
        bool has_nan = false;
        for (int64_t i = 0; i < c.count; ++i) {
          sample.push_back(x.values[b * c.size + i * c.stride]);
          has_nan |= std::isnan(sample.back());
        }
        if (!has_nan) {
          std::sort(sample.begin(), sample.end(), [](float p, float q) {
            return p < q || (p == q && std::signbit(p) && !std::signbit(q));
          });
        }
        lo.push_back(has_nan ? FloatOf(0x7FC00000) : sample[low]);
        hi.push_back(has_nan ? FloatOf(0x7FC00000) : sample[high]);
      }
      const Buffer lo_buffer(c.batch * 4), hi_buffer(c.batch * 4);
      Check(LaunchThresholds({x_buffer.As<void>(), type, c.batch, c.size, c.stride, c.count, low,
                              high, lo_buffer.As<float>(), hi_buffer.As<float>()},
                             nullptr),
            "launch");
      Check(cudaDeviceSynchronize(), "kernel");
      const std::string what = std::to_string(c.batch) + "x" + std::to_string(c.size) + " count " +
                               std::to_string(c.count) + " kind " + std::to_string(c.kind);
      group.Expect(lo_buffer, BytesOf(lo), what + " lo", 4);
      group.Expect(hi_buffer, BytesOf(hi), what + " hi", 4);
    }
  }
}

// Of the groups that have `pattern`, a regular expression, in their names.
int RunChecks(const std::string& pattern) {
  const std::regex wanted(pattern);
  int count = 0;
  const auto chosen = [&](const std::string& name) {
    const bool is_chosen = std::regex_search(name, wanted);
    count += is_chosen;
    return is_chosen;
  };
  std::mt19937 rng(1);
  for (const DType type : kTypes) {
    for (const bool large : {false, true}) {
      if (chosen(ThresholdsText(type, large))) CheckThresholds(type, large, rng);
    }
  }
  if (chosen("flush at the edge")) CheckFlushEdge();
  for (const DType type : kTypes) {
    for (const Format format : kFormats) {
      for (const bool clips : {false, true}) {
        const Setting s = {type, format, clips};
        if ((clips && format >= Format::kE4M3) || !chosen(Text(s))) continue;
        // The large shapes once a kernel: what depends on the format does not on the shape.
        const bool large = format == Format::kE2M1 && (type == DType::kBF16 || !clips);
        std::vector<Shape> shapes = SmallShapes();
        if (large) {
          for (const Shape& shape : LargeShapes()) shapes.push_back(shape);
        }
        Group group(Text(s));
        for (size_t i = 0; i < shapes.size(); ++i) {
          CheckRowsOrColumns(&group, s, shapes[i], true, i, rng);
          CheckRowsOrColumns(&group, s, shapes[i], false, i, rng);
        }
      }
      const std::string name = "gradient " + Text(Setting{type, format, false});
      if (!chosen(name)) continue;
      Group group(name);
      std::vector<Shape> shapes = SmallShapes();
      if (format == Format::kE5M2) {
        for (const Shape& shape : LargeShapes()) shapes.push_back(shape);
      }
      for (size_t i = 0; i < shapes.size(); ++i) {
        CheckGradient(&group, {type, format, false}, shapes[i], i, rng);
      }
    }
  }
  if (count == 0) {
    std::printf("no group is called %s\n", pattern.c_str());
    return 1;
  }
  std::printf("%s\n", Group::failed_groups == 0 ? "all ok" : "FAILED");
  return Group::failed_groups == 0 ? 0 : 1;
}

// --- times ---

// Normal values, 1% of them times 20, from a counter.
template <DType kType>
__global__ void FillKernel(void* x, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (i + seed * 0x632BE59BD9B4E019ull + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const float u = (static_cast<uint32_t>(z) + 0.5f) * 0x1p-32f;
    const float angle = static_cast<uint32_t>(z >> 32) * 0x1p-32f;
    float v = sqrtf(-2 * logf(fminf(u, 0.9999999f))) * cospif(2 * angle);
    if (z % 100 == 0) v *= 20;
    if constexpr (kType == DType::kF32) {
      static_cast<float*>(x)[i] = v;
    } else {
      static_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(__float_as_uint(v) >> 16);
    }
  }
}

// The median time of `runs` launches, in microseconds; run(i) is to use the i-th set of buffers.
double MedianMicroseconds(const std::function<void(int)>& run, int runs = 20) {
  for (int i = 0; i < 5; ++i) run(i);
  std::vector<cudaEvent_t> events(2 * runs);
  for (cudaEvent_t& event : events) Check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < runs; ++i) {
    Check(cudaEventRecord(events[2 * i]), "cudaEventRecord");
    run(i);
    Check(cudaEventRecord(events[2 * i + 1]), "cudaEventRecord");
  }
  Check(cudaDeviceSynchronize(), "kernel");
  std::vector<float> times(runs);
  for (int i = 0; i < runs; ++i) {
    Check(cudaEventElapsedTime(&times[i], events[2 * i], events[2 * i + 1]), "elapsed");
    Check(cudaEventDestroy(events[2 * i]), "destroy");
    Check(cudaEventDestroy(events[2 * i + 1]), "destroy");
  }
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[runs / 2] * 1e3;
}

class Bench {
 public:
  Bench() {
    Check(cudaMalloc(&memory_, kBytes), "cudaMalloc");
    constexpr int64_t kHalf = int64_t{2} << 30;
    const double time = MedianMicroseconds([&](int) {
      Check(cudaMemcpyAsync(memory_ + kHalf, memory_, kHalf, cudaMemcpyDeviceToDevice), "copy");
    });
    copy_rate_ = 2.0 * kHalf / time * 1e-6;
    std::printf("copy of 2 GiB: %.1f us, %.2f TB/s\n", time, copy_rate_);
    std::printf("%-30s %-14s %10s %8s %8s\n", "", "shape", "us", "TB/s", "of copy");
  }
  ~Bench() { cudaFree(memory_); }

  // `launch` gets an input and room for outputs, which all alternate, so that none is in L2.
  void Run(const std::string& name, DType type, int64_t rows, int64_t cols, int64_t output_bytes,
           const std::function<cudaError_t(const QuantizeInput&, uint8_t*)>& launch) {
    const int64_t input_bytes = rows * cols * Size(type);
    const int64_t room = (output_bytes + (rows + cols) * 16 + 4095) / 1024 * 1024;
    const int64_t each = (input_bytes + 1023) / 1024 * 1024 + room;
    const int sets = static_cast<int>(std::min<int64_t>(kBytes / each, 16));
    for (int i = 0; i < sets; ++i) {
      if (type == DType::kF32) {
        FillKernel<DType::kF32><<<1024, 256>>>(memory_ + i * each, rows * cols, i);
      } else {
        FillKernel<DType::kBF16><<<1024, 256>>>(memory_ + i * each, rows * cols, i);
      }
    }
    const double time = MedianMicroseconds([&](int i) {
      uint8_t* x = memory_ + i % sets * each;
      Check(launch({x, type, 1, rows, cols}, x + each - room), "launch");
    });
    const double rate = (input_bytes + output_bytes) / time * 1e-6;
    const std::string shape = std::to_string(rows) + "x" + std::to_string(cols);
    std::printf("%-30s %-14s %10.2f %8.2f %7.1f%%\n", name.c_str(), shape.c_str(), time, rate,
                100 * rate / copy_rate_);
    std::fflush(stdout);
  }

 private:
  static constexpr int64_t kBytes = int64_t{6} << 30;
  uint8_t* memory_;
  double copy_rate_;
};

void RunBench() {
  Bench bench;
  const Floats limits = {-2.33f, 2.33f};
  const Buffer limits_buffer(BytesOf(limits));
  const float* lo = limits_buffer.As<float>();
  const int64_t kRows[] = {2048, 8192, 16384}, kCols[] = {4096, 5120, 11008, 13824};
  const auto tail = [](uint8_t* out, int64_t bytes) {  // floats behind `bytes` of codes
    return reinterpret_cast<float*>(out + (bytes + 255) / 256 * 256);
  };
  for (const bool both : {false, true}) {
    for (const bool clips : {false, true}) {
      for (const int64_t m : kRows) {
        for (const int64_t k : kCols) {
          const std::string name =
              std::string("rows e2m1") + (both ? " both" : "") + (clips ? " compensate" : "");
          bench.Run(name, DType::kBF16, m, k, m * k * (both ? 2 : 1),
                    [&](const QuantizeInput& in, uint8_t* out) {
                      Outliers outliers;
                      if (clips) outliers = {lo, lo + 1};
                      return LaunchQuantizeRows(
                          {in, outliers, Format::kE2M1, out, both ? out + m * k : nullptr, nullptr,
                           tail(out, 2 * m * k)},
                          nullptr);
                    });
        }
      }
    }
  }
  bench.Run("rows e2m1 packed", DType::kBF16, 16384, 5120, 16384 * 5120 / 2,
            [&](const QuantizeInput& in, uint8_t* out) {
              return LaunchQuantizeRows(
                  {in, {}, Format::kE2M1, nullptr, nullptr, out, tail(out, in.rows * in.cols / 2)},
                  nullptr);
            });
  for (const Format format : {Format::kE1M2, Format::kE3M0, Format::kE4M3, Format::kE5M2}) {
    bench.Run(std::string("rows ") + Name(format), DType::kBF16, 16384, 5120, 16384 * 5120,
              [&](const QuantizeInput& in, uint8_t* out) {
                return LaunchQuantizeRows(
                    {in, {}, format, out, nullptr, nullptr, tail(out, in.rows * in.cols)}, nullptr);
              });
  }
  bench.Run("rows e2m1 f32", DType::kF32, 8192, 5120, 8192 * 5120,
            [&](const QuantizeInput& in, uint8_t* out) {
              return LaunchQuantizeRows(
                  {in, {}, Format::kE2M1, out, nullptr, nullptr, tail(out, in.rows * in.cols)},
                  nullptr);
            });
  bench.Run("rows e2m1 any shape", DType::kBF16, 8192, 5119, 8192 * 5119 * 2,
            [&](const QuantizeInput& in, uint8_t* out) {
              const int64_t n = in.rows * in.cols;
              return LaunchQuantizeRows(
                  {in, {}, Format::kE2M1, out, out + n, nullptr, tail(out, 2 * n)}, nullptr);
            });
  for (const DType type : {DType::kBF16, DType::kF32}) {
    for (const int outputs : {1, 2, 3}) {  // codes, codes_t
      bench.Run(std::string("columns e2m1 ") + Name(type) +
                    (outputs == 3   ? " both"
                     : outputs == 2 ? " transposed"
                                    : ""),
                type, 5120, 13824, int64_t{5120} * 13824 * (outputs == 3 ? 2 : 1),
                [&](const QuantizeInput& in, uint8_t* out) {
                  const int64_t n = in.rows * in.cols;
                  float* floats = tail(out, (outputs == 3 ? 2 : 1) * n);
                  return LaunchQuantizeColumns({in,
                                                {},
                                                Format::kE2M1,
                                                outputs & 1 ? out : nullptr,
                                                outputs == 3   ? out + n
                                                : outputs == 2 ? out
                                                               : nullptr,
                                                nullptr,
                                                floats,
                                                floats + in.cols},
                                               nullptr);
                });
    }
  }
  const Buffer counter(kCounterWords * 4);
  for (const int64_t n : {5120, 13824}) {
    const int64_t m = 16384;
    const Buffer factors(BytesOf(Floats(m + n, 0.01f)));
    bench.Run("gradient e5m2", DType::kBF16, m, n, m * n * 2,
              [&](const QuantizeInput& in, uint8_t* out) {
                float* floats = tail(out, 2 * m * n);
                const cudaError_t error =
                    LaunchGradientAmax({in, factors.As<float>(), factors.As<float>(), floats,
                                        floats + m, counter.As<TileCounter>()},
                                       nullptr);
                if (error != cudaSuccess) return error;
                return LaunchQuantizeGradient(
                    {in, Format::kE5M2, factors.As<float>(), factors.As<float>(), floats,
                     floats + m, out, floats + m + n, out + m * n, floats + 2 * m + n},
                    nullptr);
              });
  }
  for (const DType type : {DType::kBF16, DType::kF32}) {
    for (const int64_t k : {5120, 13824}) {
      const int64_t m = 16384, count = 65536, stride = m * k / count - 1;
      bench.Run(std::string("thresholds ") + Name(type), type, m, k, 0,
                [&](const QuantizeInput& in, uint8_t* out) {
                  float* floats = reinterpret_cast<float*>(out);
                  return LaunchThresholds({in.x, type, 1, in.rows * in.cols, stride, count, 655,
                                           count - 656, floats, floats + 1},
                                          nullptr);
                });
    }
  }
}

}  // namespace
}  // namespace jfp4

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "bench") == 0) {
    jfp4::RunBench();
    return 0;
  }
  return jfp4::RunChecks(argc > 1 ? argv[1] : "");
}
