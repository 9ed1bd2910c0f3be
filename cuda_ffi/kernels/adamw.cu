// AdamW's step on the GPU: every byte of parameters, gradient and moments is read once, and what is
// new is written once. (Of rows that are no whole blocks every byte is read twice.)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "cuda_ffi/kernels/adamw.h"
#include "cuda_ffi/kernels/element.cuh"

namespace jfp4 {
namespace {

using adamw::Element;

constexpr int kThreads = 256, kWarp = 32;
constexpr int kEach = 8;                       // consecutive elements of a thread
constexpr int kLanes = AdamW::kBlock / kEach;  // threads of a block of elements
static_assert(kLanes == 16, "half a warp has a block, and shuffles within it");

// --- elements in memory ---

__host__ __device__ constexpr int ElementBytes(Moment type) {
  return type == Moment::kE4M3 ? 1 : type == Moment::kF16 ? 2 : 4;
}

// kEach elements as memory has them, in as many of the words as they fill.
struct Words {
  uint32_t word[kEach];
};

// What is fetched is decoded later: all of a thread's fetches are to be under way together, and a
// branch by type that also decoded would wait for each.
__device__ __forceinline__ Words Fetch(const void* from, int element_bytes, int64_t offset) {
  const auto* at = static_cast<const char*>(from) + offset * element_bytes;
  Words words;
  if (element_bytes == 1) {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    words.word[0] = v.x, words.word[1] = v.y;
    return words;
  }
  const auto quarter = [&](int i) {
    const uint4 v = *reinterpret_cast<const uint4*>(at + 4 * i);
    words.word[i] = v.x, words.word[i + 1] = v.y;
    words.word[i + 2] = v.z, words.word[i + 3] = v.w;
  };
  quarter(0);
  if (element_bytes == 4) quarter(4);
  return words;
}

template <DType kType>
__device__ __forceinline__ void DecodeAs(const Words& words, float (&to)[kEach]) {
  constexpr int kElements = Word<kType>::kElements;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    to[i] = Word<kType>::Get(words.word[i / kElements], i % kElements);
  }
}

__device__ __forceinline__ void Decode(const Words& words, DType type, float (&to)[kEach]) {
  switch (type) {
    case DType::kBF16:
      return DecodeAs<DType::kBF16>(words, to);
    case DType::kF16:
      return DecodeAs<DType::kF16>(words, to);
    case DType::kF32:
      return DecodeAs<DType::kF32>(words, to);
  }
}

__device__ __forceinline__ void Decode(const Words& words, Moment type, float (&to)[kEach]) {
  if (type == Moment::kE4M3) {
#pragma unroll
    for (int i = 0; i < kEach; i += 2) {
      const uint32_t halves = HalvesOf<Format::kE4M3>(words.word[i / 4] >> 8 * (i % 4));
      to[i] = Word<DType::kF16>::Get(halves, 0);
      to[i + 1] = Word<DType::kF16>::Get(halves, 1);
    }
  } else {
    Decode(words, type == Moment::kF16 ? DType::kF16 : DType::kF32, to);
  }
}

template <int kCount>
__device__ __forceinline__ void StoreWords(void* to, int64_t offset_bytes,
                                           const uint32_t (&words)[kCount]) {
  auto* at = static_cast<char*>(to) + offset_bytes;
  if constexpr (kCount == 2) {
    *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      *reinterpret_cast<uint4*>(at + 4 * i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

__device__ __forceinline__ uint16_t HalfBits(float v, DType type) {
  return type == DType::kBF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v))
                              : __half_as_ushort(__float2half_rn(v));
}

__device__ __forceinline__ void Store(const float (&from)[kEach], DType type, void* to,
                                      int64_t offset) {
  if (type == DType::kF32) {
    uint32_t words[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) words[i] = __float_as_uint(from[i]);
    StoreWords(to, 4 * offset, words);
  } else {
    uint32_t words[kEach / 2];
#pragma unroll
    for (int i = 0; i < kEach; i += 2) {
      words[i / 2] = HalfBits(from[i], type) | uint32_t{HalfBits(from[i + 1], type)} << 16;
    }
    StoreWords(to, 2 * offset, words);
  }
}

__device__ __forceinline__ void Store(const float (&from)[kEach], Moment type, void* to,
                                      int64_t offset) {
  if (type == Moment::kE4M3) {
    uint32_t words[kEach / 4];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      words[i / 4] = ToBytes<Format::kE4M3>(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
    StoreWords(to, offset, words);
  } else {
    Store(from, type == Moment::kF16 ? DType::kF16 : DType::kF32, to, offset);
  }
}

// One number.
__device__ __forceinline__ float LoadMoment(const void* from, Moment type, int64_t index) {
  if (type == Moment::kE4M3)
    return FromByte<Format::kE4M3>(static_cast<const uint8_t*>(from)[index]);
  return LoadElement(from, type == Moment::kF16 ? DType::kF16 : DType::kF32, index);
}

__device__ __forceinline__ void StoreElement(float v, DType type, void* to, int64_t index) {
  if (type == DType::kF32) {
    static_cast<float*>(to)[index] = v;
  } else {
    static_cast<uint16_t*>(to)[index] = HalfBits(v, type);
  }
}

__device__ __forceinline__ void StoreMoment(float v, Moment type, void* to, int64_t index) {
  if (type == Moment::kE4M3) {
    static_cast<uint8_t*>(to)[index] = ToBytes<Format::kE4M3>(v, 0.0f, 0.0f, 0.0f) & 0xFF;
  } else {
    StoreElement(v, type == Moment::kF16 ? DType::kF16 : DType::kF32, to, index);
  }
}

// --- what both kernels do with a block ---

// Division by what a whole launch divides by: a product and a shift (Granlund and Montgomery,
// Division by Invariant Integers using Multiplication, 1994, figure 4.1).
struct Divider {
  uint32_t divisor, multiplier;
  int shift;

  explicit Divider(uint32_t by) : divisor(by), multiplier(0), shift(0) {
    while (uint64_t{1} << shift < by) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - by;
    multiplier = static_cast<uint32_t>((excess << 32) / by + 1);
  }

  // Of a number under 2^31.
  __device__ __forceinline__ uint32_t Quotient(uint32_t number) const {
    return (__umulhi(number, multiplier) + number) >> shift;
  }
};

// The blocks of a launch.
struct Blocks {
  uint32_t count;
  Divider of_row, rows;  // blocks of a row, rows of a slice
};

// Where a block of elements lies, and its bits' keys; every thread of a block has the same.
struct Place {
  int64_t first;    // element
  uint32_t column;  // of the tensor
  AdamW::Keys row;

  __device__ __forceinline__ Place(const AdamW& args, const Blocks& blocks, uint32_t block,
                                   uint32_t size) {
    const uint32_t row_of_all = blocks.of_row.Quotient(block);
    const uint32_t slice = blocks.rows.Quotient(row_of_all);
    const uint32_t row_of_slice = row_of_all - slice * blocks.rows.divisor;
    first = int64_t{block} * size;
    const AdamW::Keys keys = args.keys[slice];
    column = (block - row_of_all * blocks.of_row.divisor) * size + keys.column;
    row = {adamw::Mix(row_of_slice + keys.param), adamw::Mix(row_of_slice + keys.first),
           adamw::Mix(row_of_slice + keys.second)};
  }
};

// A float16 parameter is kept times 2^10.
__device__ __forceinline__ float Factor(DType type) { return type == DType::kF16 ? 0x1p10f : 1.0f; }

__device__ __forceinline__ float FromKept(float v, DType type) {
  return type == DType::kF16 ? __fmul_rn(v, 0x1p-10f) : v;
}

__device__ __forceinline__ adamw::Grid GridOf(DType type) {
  // A copy: returned as they are, the constants would have to lie in the device's memory.
  const adamw::Grid grid = type == DType::kBF16 ? adamw::kBF16Grid : adamw::kF16Grid;
  return grid;
}

__device__ __forceinline__ float RoundParam(float v, DType type, uint32_t row, uint32_t column) {
  if (type == DType::kF32) return v;
  return adamw::RoundStochastically(__fmul_rn(v, Factor(type)), GridOf(type),
                                    adamw::Mix(row ^ column));
}

// Eight neighbours of a row. Each of them may be tiny, or no number, but hardly ever is one, so
// that the choice is made once for all.
__device__ __forceinline__ void RoundParams(float (&v)[kEach], DType type, uint32_t row,
                                            uint32_t column) {
  if (type == DType::kF32) return;
  const adamw::Grid grid = GridOf(type);
  bool usual = true;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    v[i] = __fmul_rn(v[i], Factor(type));
    usual &= adamw::IsNormal(v[i], grid);
  }
  if (usual) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      v[i] = adamw::RoundNormal(v[i], grid, adamw::Mix(row ^ (column + i)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      v[i] = adamw::RoundStochastically(v[i], grid, adamw::Mix(row ^ (column + i)));
    }
  }
}

__device__ __forceinline__ float RoundMoment(float v, Moment type, bool stochastic, uint32_t row,
                                             uint32_t column) {
  if (!stochastic || type == Moment::kF32) return v;  // stored to nearest
  const adamw::Grid grid = type == Moment::kE4M3 ? adamw::kE4M3Grid : adamw::kF16Grid;
  return adamw::RoundStochastically(v, grid, adamw::Mix(row ^ column));
}

template <int kWidth>
__device__ __forceinline__ uint32_t LargestOf(uint32_t value, uint32_t mask) {
#pragma unroll
  for (int i = kWidth / 2; i > 0; i /= 2) value = max(value, __shfl_xor_sync(mask, value, i));
  return value;
}

// What arrays are made of, where the compiler is to know it: to choose among ways to decode, round
// and store narrow ones at run time takes over a quarter longer.
template <DType kParam, Moment kFirst, Moment kSecond, bool kStochastic>
struct Known {
  static bool Fits(const AdamW& args) {
    return args.param_type == kParam && args.grad_type == kParam && args.first_type == kFirst &&
           args.second_type == kSecond && args.stochastic == kStochastic && args.root;
  }
  static __device__ __forceinline__ void Tell(AdamW& args) {
    args.param_type = args.grad_type = kParam;
    args.first_type = kFirst;
    args.second_type = kSecond;
    args.stochastic = kStochastic;
    args.root = true;
  }
};

struct Unknown {
  static bool Fits(const AdamW&) { return true; }
  static __device__ __forceinline__ void Tell(AdamW&) {}
};

// --- kernels ---

// Rows of whole blocks: half a warp has one, in registers.
template <typename Types>
__global__ void __launch_bounds__(kThreads) BlocksKernel(AdamW args, Blocks blocks) {
  Types::Tell(args);
  const uint32_t block = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (block >= blocks.count) return;
  const uint32_t lane = threadIdx.x % kLanes, half = 0xFFFFu << (threadIdx.x & kLanes);
  const int64_t offset = int64_t{block} * AdamW::kBlock + lane * kEach;
  const bool scaled1 = args.first_type != Moment::kF32, scaled2 = args.second_type != Moment::kF32;
  const Words grad_words = Fetch(args.grad, ElementBytes(args.grad_type), offset);
  const Words param_words = Fetch(args.param, ElementBytes(args.param_type), offset);
  const Words first_words = Fetch(args.first, ElementBytes(args.first_type), offset);
  const Words second_words = Fetch(args.second, ElementBytes(args.second_type), offset);
  const uint32_t exponent1 = scaled1 ? args.first_exponents[block] : 127;
  const uint32_t exponent2 = scaled2 ? args.second_exponents[block] : 127;
  const Place place(args, blocks, block, AdamW::kBlock);
  const AdamW::Rates rates = *args.rates;
  if (rates.finite == 0) return;

  const uint32_t column = place.column + lane * kEach;
  float grad[kEach], param[kEach], first[kEach], second[kEach];
  Decode(grad_words, args.grad_type, grad);
  Decode(param_words, args.param_type, param);
  Decode(first_words, args.first_type, first);
  Decode(second_words, args.second_type, second);
  const float scale1 = adamw::ScaleOfExponent(exponent1);
  const float scale2 = adamw::ScaleOfExponent(exponent2);

  uint32_t amax1 = 0, amax2 = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const Element next =
        adamw::Advance(args, rates, grad[i],
                       {FromKept(param[i], args.param_type), __fmul_rn(first[i], scale1),
                        __fmul_rn(second[i], scale2)});
    param[i] = next.param;
    first[i] = next.first;
    second[i] = next.second;
    amax1 = max(amax1, MagnitudeBits(next.first));
    amax2 = max(amax2, MagnitudeBits(next.second));
  }
  RoundParams(param, args.param_type, place.row.param, column);
  Store(param, args.param_type, args.param, offset);

  const auto write = [&](float (&moment)[kEach], Moment type, uint32_t amax, uint32_t row,
                         void* codes, uint8_t* exponents) {
    if (type != Moment::kF32) {
      const uint32_t exponent = adamw::ScaleExponent(LargestOf<kLanes>(amax, half), type);
      const float inverse = adamw::InverseScale(exponent);
#pragma unroll
      for (int i = 0; i < kEach; ++i) moment[i] = __fmul_rn(moment[i], inverse);
      if (args.stochastic) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          moment[i] = RoundMoment(moment[i], type, true, row, column + i);
        }
      }
      if (lane == 0) exponents[block] = static_cast<uint8_t>(exponent);
    }
    Store(moment, type, codes, offset);
  };
  write(first, args.first_type, amax1, place.row.first, args.first, args.first_exponents);
  write(second, args.second_type, amax2, place.row.second, args.second, args.second_exponents);
}

// Rows of any length: a warp has one, and computes it twice, for the scales and then for the codes.
__global__ void __launch_bounds__(kThreads) RowsKernel(AdamW args, Blocks rows) {
  const AdamW::Rates rates = *args.rates;
  const uint32_t row = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (rates.finite == 0 || row >= rows.count) return;
  const uint32_t lane = threadIdx.x % kWarp, n = static_cast<uint32_t>(args.n);
  const Place place(args, rows, row, n);
  const bool scaled1 = args.first_type != Moment::kF32, scaled2 = args.second_type != Moment::kF32;
  const float scale1 = scaled1 ? adamw::ScaleOfExponent(args.first_exponents[row]) : 1.0f;
  const float scale2 = scaled2 ? adamw::ScaleOfExponent(args.second_exponents[row]) : 1.0f;

  const auto advance = [&](uint32_t i) {
    const int64_t at = place.first + i;
    return adamw::Advance(args, rates, LoadElement(args.grad, args.grad_type, at),
                          {FromKept(LoadElement(args.param, args.param_type, at), args.param_type),
                           __fmul_rn(LoadMoment(args.first, args.first_type, at), scale1),
                           __fmul_rn(LoadMoment(args.second, args.second_type, at), scale2)});
  };
  uint32_t amax1 = 0, amax2 = 0;
  for (uint32_t i = lane; i < n; i += kWarp) {
    const Element next = advance(i);
    amax1 = max(amax1, MagnitudeBits(next.first));
    amax2 = max(amax2, MagnitudeBits(next.second));
  }
  const uint32_t exponent1 = adamw::ScaleExponent(LargestOf<kWarp>(amax1, ~0u), args.first_type);
  const uint32_t exponent2 = adamw::ScaleExponent(LargestOf<kWarp>(amax2, ~0u), args.second_type);
  const float inverse1 = scaled1 ? adamw::InverseScale(exponent1) : 1.0f;
  const float inverse2 = scaled2 ? adamw::InverseScale(exponent2) : 1.0f;
  for (uint32_t i = lane; i < n; i += kWarp) {
    const Element next = advance(i);
    const int64_t at = place.first + i;
    const uint32_t column = place.column + i;
    StoreElement(RoundParam(next.param, args.param_type, place.row.param, column), args.param_type,
                 args.param, at);
    StoreMoment(RoundMoment(__fmul_rn(next.first, inverse1), args.first_type, args.stochastic,
                            place.row.first, column),
                args.first_type, args.first, at);
    StoreMoment(RoundMoment(__fmul_rn(next.second, inverse2), args.second_type, args.stochastic,
                            place.row.second, column),
                args.second_type, args.second, at);
  }
  // All lanes have read their row's scales: the shuffles stand between.
  if (lane == 0 && scaled1) args.first_exponents[row] = static_cast<uint8_t>(exponent1);
  if (lane == 0 && scaled2) args.second_exponents[row] = static_cast<uint8_t>(exponent2);
}

using Kernel = void (*)(AdamW, Blocks);

// The kernel of the first types that fit.
template <typename Types, typename... Rest>
Kernel BlocksKernelFor(const AdamW& args) {
  if constexpr (sizeof...(Rest) > 0) {
    if (!Types::Fits(args)) return BlocksKernelFor<Rest...>(args);
  }
  return BlocksKernel<Types>;
}

template <DType kParam, bool kStochastic>
using Narrow = Known<kParam, Moment::kE4M3, Moment::kF16, kStochastic>;

}  // namespace

cudaError_t LaunchAdamW(const AdamW& args, cudaStream_t stream) {
  const int64_t size = args.block();
  if (args.slices * args.rows * args.n == 0) return cudaSuccess;
  const int64_t blocks = args.slices * args.rows * (args.n / size);
  const bool whole = size == AdamW::kBlock;
  const int64_t per_grid_block = kThreads / (whole ? kLanes : kWarp);
  const int64_t grid = (blocks + per_grid_block - 1) / per_grid_block;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  // What the kernels reckon in 32 bits.
  if (blocks > kMost || args.n > kMost || args.rows > kMost) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid);
  config.blockDim = kThreads;
  config.stream = stream;
  Kernel kernel = RowsKernel;
  if (whole) {
    kernel = BlocksKernelFor<Narrow<DType::kBF16, false>, Narrow<DType::kBF16, true>,
                             Narrow<DType::kF16, false>, Narrow<DType::kF16, true>, Unknown>(args);
  }
  const auto narrow = [](int64_t number) { return static_cast<uint32_t>(number); };
  return cudaLaunchKernelEx(
      &config, kernel, args,
      Blocks{narrow(blocks), Divider(narrow(args.n / size)), Divider(narrow(args.rows))});
}

}  // namespace jfp4
