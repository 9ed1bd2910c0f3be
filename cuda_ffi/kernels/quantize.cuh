// What the quantising kernels share: places of tiles, scaling and encoding of vectors, stores of
// codes in both layouts, and launches by type and format. The kernels are bound by memory: each
// reads its input as few times as its reduction allows and writes every layout in whole 32-byte
// sectors.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/quantize.h"

namespace jfp4 {

// --- vectors ---

// Elements in the 16 bytes that a thread loads at once.
constexpr int kVectorBytes = 16;
template <DType kType>
constexpr int kPerVector = kVectorBytes / ElementBytes(kType);

// Tiles are counted in 32 bits, as blocks are.
__device__ __forceinline__ uint32_t TileCount(int64_t size, int tile) {
  return static_cast<uint32_t>((size + tile - 1) / tile);
}

// Where a block's part of its matrix lies: parts of part_rows x part_cols in row-major order,
// matrix after matrix, those at the edges smaller.
struct Place {
  int64_t batch, first_row, first_col;
  int rows, cols;

  __device__ __forceinline__ Place(uint32_t index, int64_t all_rows, int64_t all_cols,
                                   int part_rows, int part_cols) {
    const uint32_t across = TileCount(all_cols, part_cols), down = TileCount(all_rows, part_rows);
    first_col = int64_t{index % across} * part_cols;
    first_row = int64_t{index / across % down} * part_rows;
    batch = index / (across * down);
    rows = static_cast<int>(min(all_rows - first_row, int64_t{part_rows}));
    cols = static_cast<int>(min(all_cols - first_col, int64_t{part_cols}));
  }
};

__device__ __forceinline__ uint32_t WarpMax(uint32_t v) { return __reduce_max_sync(~0u, v); }

// The limits of a matrix; an absent one limits nothing.
__device__ __forceinline__ Limits LoadLimits(const Outliers& outliers, int64_t batch) {
  const float infinity = __uint_as_float(kInfinityBits);
  return {outliers.lo == nullptr ? -infinity : outliers.lo[batch],
          outliers.hi == nullptr ? infinity : outliers.hi[batch]};
}

template <DType kType>
__device__ __forceinline__ void Unpack(const uint4& vector, float (&x)[kPerVector<kType>]) {
  constexpr int kElements = Word<kType>::kElements;
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < kPerVector<kType>; ++i) {
    x[i] = Word<kType>::Get(words[i / kElements], i % kElements);
  }
}

// How each element of a vector is scaled, from the reciprocals of scales, which are NaN where those
// are. `keep` has a byte an element: all ones, or zero where the scale is NaN, which makes the code
// zero.
template <int kElements>
struct Scaling {
  float inverse[kElements];
  uint32_t keep[kElements / 4];

  // One scale for all of them.
  __device__ __forceinline__ void SetAll(float reciprocal) {
#pragma unroll
    for (float& i : inverse) i = reciprocal;
#pragma unroll
    for (uint32_t& k : keep) k = isnan(reciprocal) ? 0u : ~0u;
  }

  __device__ __forceinline__ void SetEach(const float* reciprocals) {
#pragma unroll
    for (uint32_t& k : keep) k = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      inverse[i] = reciprocals[i];
      keep[i / 4] |= isnan(reciprocals[i]) ? 0u : 0xFFu << i % 4 * 8;
    }
  }
};

// Codes times a power of two.
template <Format kFormat, Clip kClip, int kElements, typename AnyLimits>
__device__ __forceinline__ void Encode(const float (&x)[kElements],
                                       const Scaling<kElements>& scaling, const AnyLimits& limits,
                                       uint32_t (&words)[kElements / 4], float factor = 1) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    float code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      code[j] = factor * Code<kFormat, kClip>(x[4 * i + j], scaling.inverse[4 * i + j], limits);
    }
    words[i] =
        scaling.keep[i] & ToBytes<Carrier(kFormat, kClip)>(code[0], code[1], code[2], code[3]);
  }
}

// The signs of a vector's elements 4 * i to 4 * i + 3, in the highest bits of bytes.
template <DType kType>
__device__ __forceinline__ uint32_t Signs(const uint32_t (&words)[4], int i) {
  constexpr uint32_t kSigns = 0x80808080;
  if constexpr (kType != DType::kF32) {
    return __byte_perm(words[2 * i], words[2 * i + 1], 0x7531) & kSigns;
  } else {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0073),
                       __byte_perm(words[2], words[3], 0x7300), 0x7610) &
           kSigns;
  }
}

// The same of a vector. Codes that are not clipped have the signs of the elements, so there it is
// enough to round magnitudes.
template <DType kType, Format kFormat, Clip kClip, typename AnyLimits>
__device__ __forceinline__ void EncodeVector(const uint4& vector,
                                             const Scaling<kPerVector<kType>>& scaling,
                                             const AnyLimits& limits,
                                             uint32_t (&words)[kPerVector<kType> / 4],
                                             float factor = 1) {
  float x[kPerVector<kType>];
  Unpack<kType>(vector, x);
  if constexpr (!IsFourBit(kFormat) || kClip != Clip::kNone) {
    Encode<kFormat, kClip>(x, scaling, limits, words, factor);
  } else {
    const uint32_t signed_words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < kPerVector<kType> / 4; ++i) {
      float code[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scaled = Scaled(fabsf(x[4 * i + j]), scaling.inverse[4 * i + j]);
        code[j] = factor * RoundMagnitude<kFormat>(scaled);
      }
      words[i] =
          scaling.keep[i] & (ToBytes<Carrier(kFormat, kClip)>(code[0], code[1], code[2], code[3]) |
                             Signs<kType>(signed_words, i));
    }
  }
}

// Codes to an address aligned to their size. `kStreams` has them leave L2 before others.
template <bool kStreams = false, int kWords>
__device__ __forceinline__ void StoreBytes(void* to, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  const auto store = [](auto* place, auto value) {
    if constexpr (kStreams) {
      __stcs(place, value);
    } else {
      *place = value;
    }
  };
  if constexpr (kWords == 4) {
    store(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
  } else if constexpr (kWords == 2) {
    store(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
  } else {
    store(static_cast<uint32_t*>(to), words[0]);
  }
}

// E2M1 codes as nibbles; from codes times kSmall, if `kAreSmall`, it takes fewer operations.
constexpr float kSmall = 1.0f / 64;
template <bool kAreSmall = false, int kWords>
__device__ __forceinline__ void StoreNibbles(void* to, const uint32_t (&words)[kWords]) {
  const auto nibbles_of = [](uint32_t first, uint32_t second) {
    return kAreSmall ? SmallToNibbles(first, second) : ToNibbles(first, second);
  };
  if constexpr (kWords == 1) {
    *static_cast<uint16_t*>(to) = static_cast<uint16_t>(nibbles_of(words[0], 0));
  } else {
    uint32_t nibbles[kWords / 2];
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      nibbles[i] = nibbles_of(words[2 * i], words[2 * i + 1]);
    }
    StoreBytes(to, nibbles);
  }
}

// --- columns of codes ---

// A thread writes 16 bytes of a column.
constexpr int kGroupRows = 16;

// The codes of four rows, a word of four columns each, to rows 4 * i to 4 * i + 3 of the columns.
// `swapped` is as TransposeBytes has it.
template <int kWords>
__device__ __forceinline__ void TransposeWords(const uint32_t (&words)[4],
                                               uint32_t (*columns)[kWords], int i,
                                               bool swapped = false) {
  uint32_t out[4];
  TransposeBytes(words, out, swapped);
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[j][i] = out[j];
}

// Square tiles of codes wait in shared memory to be read by column: four columns, a word, of a
// group of rows, by a thread, the groups of a tile by adjacent lanes, so that a warp writes whole
// columns of the tile. Its row stride being a multiple of all 32 banks, the words of group g are
// moved by g * kGroupShift, which gives each lane a bank of its own.
constexpr int kTile = 128;
constexpr int kTileStride = kTile / 4;  // words
constexpr int kTileThreads = 256;
constexpr int kBanks = 32;
constexpr int kGroups = kTile / kGroupRows;
constexpr int kGroupShift = kBanks / kGroups;
static_assert(kTileStride % kBanks == 0);

__device__ __forceinline__ int TileWord(int row, int word) {
  return row * kTileStride + (word ^ row / kGroupRows * kGroupShift);
}

// Writes the columns that this thread has of a tile of `rows` x `cols` codes, a multiple of
// kGroupRows by one of four. Column c of the tile starts at codes_t + c * pitch.
template <bool kStreams = false>
__device__ __forceinline__ void StoreTransposed(const uint32_t* tile, int rows, int cols,
                                                int64_t pitch, uint8_t* codes_t) {
  for (int item = threadIdx.x; item < kGroups * (cols / 4); item += kTileThreads) {
    const int row = item % kGroups * kGroupRows, word = item / kGroups;
    if (row >= rows) continue;
    const uint32_t* from = tile + TileWord(row, word);
    uint32_t columns[4][kGroupRows / 4];
#pragma unroll
    for (int i = 0; i < kGroupRows / 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = from[(4 * i + j) * kTileStride];
      TransposeWords(words, columns, i);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      StoreBytes<kStreams>(codes_t + (4 * word + j) * pitch + row, columns[j]);
    }
  }
}

// --- launching ---

template <typename... Params, typename... Args>
cudaError_t LaunchWith(cudaLaunchAttribute* attribute, void (*kernel)(Params...), int64_t blocks,
                       int threads, cudaStream_t stream, const Args&... args) {
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                   const Args&... args) {
  return LaunchWith(nullptr, kernel, blocks, threads, stream, args...);
}

// Launches a kernel that may begin before the one before it has ended: all of its blocks call
// WaitForLast, so that what comes after it comes after both.
template <typename... Params, typename... Args>
cudaError_t LaunchEarly(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                        const Args&... args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return LaunchWith(&early, kernel, blocks, threads, stream, args...);
}

// When all blocks of a kernel have called this, or have ended, one that LaunchEarly has put behind
// it may begin.
__device__ __forceinline__ void LetNextBegin() {
  asm volatile("griddepcontrol.launch_dependents;");
}

// Returns when the kernel before this one has ended, and what it wrote can be seen.
__device__ __forceinline__ void WaitForLast() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <Format kFormat>
using FormatConstant = std::integral_constant<Format, kFormat>;
template <DType kType>
using TypeConstant = std::integral_constant<DType, kType>;
template <Clip kClip>
using ClipConstant = std::integral_constant<Clip, kClip>;

// Calls f with the run-time value as a constant.
template <typename F>
cudaError_t WithType(DType type, F&& f) {
  switch (type) {
    case DType::kBF16:
      return f(TypeConstant<DType::kBF16>());
    case DType::kF16:
      return f(TypeConstant<DType::kF16>());
    case DType::kF32:
      return f(TypeConstant<DType::kF32>());
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t WithFormat(Format format, F&& f) {
  switch (format) {
    case Format::kE2M1:
      return f(FormatConstant<Format::kE2M1>());
    case Format::kE1M2:
      return f(FormatConstant<Format::kE1M2>());
    case Format::kE3M0:
      return f(FormatConstant<Format::kE3M0>());
    case Format::kE2M1B3:
      return f(FormatConstant<Format::kE2M1B3>());
    case Format::kE4M3:
      return f(FormatConstant<Format::kE4M3>());
    case Format::kE5M2:
      return f(FormatConstant<Format::kE5M2>());
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t WithAll(DType type, Format format, const Outliers& outliers, F&& f) {
  return WithType(type, [&](auto t) {
    return WithFormat(format, [&](auto q) {
      if constexpr (IsFourBit(q())) {
        if (outliers.lo != nullptr) return f(t, q, ClipConstant<Clip::kCompensate>());
      }
      return f(t, q, ClipConstant<Clip::kNone>());
    });
  });
}

inline bool IsAligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Whether rows of the input are whole vectors, and those of its codes whole words to match.
inline bool HasVectors(const QuantizeInput& in, const void* codes, const void* packed) {
  const int elements = kVectorBytes / ElementBytes(in.type);
  return in.rows > 0 && in.cols > 0 && in.cols % elements == 0 && IsAligned(in.x, kVectorBytes) &&
         IsAligned(codes, elements) && IsAligned(packed, elements / 2);
}

// Whether columns of the codes are whole groups, to be stored 16 bytes at a time.
inline bool HasGroups(const QuantizeInput& in, const void* codes_t, const void* packed_t) {
  return in.rows % kGroupRows == 0 && IsAligned(codes_t, kGroupRows) &&
         IsAligned(packed_t, kGroupRows / 2);
}

// A block a tile.
inline int64_t TileBlocks(const QuantizeInput& in) {
  return in.batch * CeilDiv(in.rows, kTile) * CeilDiv(in.cols, kTile);
}

}  // namespace jfp4
