// AdamW's step on the GPU: every byte of parameters, gradient and moments is read once, and what is
// new is written once. (Of rows that are no whole blocks every byte is read twice.)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <limits>
#include <type_traits>

#include "cuda_ffi/kernels/adamw.h"
#include "cuda_ffi/kernels/element.cuh"

namespace jfp4 {
namespace {

using adamw::Element;

constexpr int kThreads = 256, kWarp = 32;
constexpr int kBlocksAtOnce = 5;               // that registers are to leave room for
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
// branch by type that also decoded would wait for each. Volatile, or the compiler would put off
// those of what is needed last.
__device__ __forceinline__ Words Fetch(const void* from, int element_bytes, int64_t offset) {
  const auto* at = static_cast<const char*>(from) + offset * element_bytes;
  Words words;
  if (element_bytes == 1) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.word[0]), "=r"(words.word[1])
                 : "l"(at));
    return words;
  }
  const auto quarter = [&](int i) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[i]), "=r"(words.word[i + 1]), "=r"(words.word[i + 2]),
                   "=r"(words.word[i + 3])
                 : "l"(at + 4 * i));
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

// Two in two bytes each. Of bfloat16, which only parameters are in, the lower bits are cut off:
// they have been rounded.
__device__ __forceinline__ uint32_t PairBits(float a, float b, DType type) {
  if (type == DType::kBF16) return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
  return __half_as_ushort(__float2half_rn(a)) | uint32_t{__half_as_ushort(__float2half_rn(b))}
                                                    << 16;
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
      words[i / 2] = PairBits(from[i], from[i + 1], type);
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
    static_cast<uint16_t*>(to)[index] = PairBits(v, 0, type) & 0xFFFF;
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

// Where a block of elements lies, and its row's bits; every thread of a block has the same.
struct Place {
  int64_t first;    // element
  uint32_t column;  // of the tensor
  uint32_t row_of_params, row_of_moments;

  __device__ __forceinline__ Place(const AdamW& args, const Blocks& blocks, uint32_t block,
                                   uint32_t size) {
    const uint32_t row_of_all = blocks.of_row.Quotient(block);
    const uint32_t slice = blocks.rows.Quotient(row_of_all);
    const uint32_t row_of_slice = row_of_all - slice * blocks.rows.divisor;
    first = int64_t{block} * size;
    const AdamW::Keys keys = args.keys[slice];
    column = (block - row_of_all * blocks.of_row.divisor) * size + keys.column;
    row_of_params = adamw::Mix(row_of_slice + keys.param);
    row_of_moments = adamw::Mix(row_of_slice + keys.moments);
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
                                    adamw::ParamBits(type, row, column));
}

__device__ __forceinline__ adamw::Grid GridOf(Moment type) {
  const adamw::Grid grid = type == Moment::kE4M3 ? adamw::kE4M3Grid : adamw::kF16Grid;
  return grid;
}

// Whether a magnitude, times the scale's inverse, is normal in its format.
__device__ __forceinline__ bool IsNormal(float magnitude, float inverse, Moment type) {
  return type == Moment::kF32 || __fmul_rn(magnitude, inverse) >= GridOf(type).least;
}

template <bool kNormal>
__device__ __forceinline__ float RoundMoment(float v, Moment type, bool stochastic, uint32_t bits) {
  if (!stochastic || type == Moment::kF32) return v;  // stored to nearest
  return kNormal ? adamw::RoundNormal(v, GridOf(type), bits)
                 : adamw::RoundStochastically(v, GridOf(type), bits);
}

// Over so many neighbouring lanes; all of the warp's take part.
template <int kWidth>
__device__ __forceinline__ uint32_t LargestOf(uint32_t value) {
#pragma unroll
  for (int i = kWidth / 2; i > 0; i /= 2) value = max(value, __shfl_xor_sync(~0u, value, i));
  return value;
}

// The scales' exponents of a block, from the largest magnitudes that its lanes have: a scale is a
// matter of their binades, and both fit into a word.
struct Exponents {
  uint32_t first, second;

  __device__ __forceinline__ Exponents(const AdamW& args, uint32_t amax1, uint32_t amax2) {
    uint32_t binades = amax1 >> adamw::kMantissaBits | amax2 >> adamw::kMantissaBits << 16;
#pragma unroll
    for (int i = kLanes / 2; i > 0; i /= 2) {
      binades = __vmaxu2(binades, __shfl_xor_sync(~0u, binades, i));
    }
    first = adamw::ScaleExponent(binades << adamw::kMantissaBits, args.first_type);
    second = adamw::ScaleExponent(binades >> 16 << adamw::kMantissaBits, args.second_type);
  }
};

// --- roots and reciprocals of numbers that need no care ---

// The largest and the least magnitudes of a thread's moments, as bits, which sort as they do, with
// NaN above all.
struct Range {
  uint32_t most_first = 0, least_first = ~0u, most_second = 0, least_second = ~0u;

  __device__ __forceinline__ Range(const float (&first)[kEach], const float (&second)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      most_first = max(most_first, MagnitudeBits(first[i]));
      least_first = min(least_first, MagnitudeBits(first[i]));
      // A second moment is never negative.
      most_second = max(most_second, __float_as_uint(second[i]));
      least_second = min(least_second, __float_as_uint(second[i]));
    }
  }

  // Whether on the way to roots and reciprocals, in the sequences below, nothing overflows or is
  // subnormal.
  __device__ __forceinline__ bool IsUsual(const AdamW& args, const AdamW::Rates& rates) const {
    const auto within = [](float v, float lo, float hi) { return (v >= lo) & (v <= hi); };
    return (least_second >= __float_as_uint(0x1p-90f)) & (most_second <= __float_as_uint(0x1p20f)) &
           within(rates.second_correction, 1, 0x1p8f) & within(args.eps, 0, 0x1p10f);
  }
};

// The correctly rounded root, and below the reciprocal, by the compiler's own sequences for them
// (Markstein, IBM J. Res. Dev. 34, 1990), which it guards by a branch an operation.
__device__ __forceinline__ float UsualRoot(float x) {
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  const float root = __fmul_rn(x, reciprocal), half = __fmul_rn(reciprocal, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
}

__device__ __forceinline__ float UsualReciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, inverse, 1), inverse, inverse);
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
  static __device__ __forceinline__ void Tell(AdamW&) {}
};

// --- kernels ---

// Half a warp's block, in registers. Unless told to be careful it takes all numbers for usual ones,
// without a branch, and changes nothing and says so if one of the warp's is not.
template <typename Types, bool kCareful>
__device__ __forceinline__ bool UpdateBlock(AdamW args, const Blocks& blocks, uint32_t block,
                                            bool inside) {
  Types::Tell(args);
  const uint32_t lane = threadIdx.x % kLanes;
  const int64_t offset = int64_t{block} * AdamW::kBlock + lane * kEach;
  const bool scaled1 = args.first_type != Moment::kF32, scaled2 = args.second_type != Moment::kF32;
  const Words grad_words = Fetch(args.grad, ElementBytes(args.grad_type), offset);
  const Words param_words = Fetch(args.param, ElementBytes(args.param_type), offset);
  const Words first_words = Fetch(args.first, ElementBytes(args.first_type), offset);
  const Words second_words = Fetch(args.second, ElementBytes(args.second_type), offset);
  const uint32_t exponent1 = scaled1 ? args.first_exponents[block] : 127;
  const uint32_t exponent2 = scaled2 ? args.second_exponents[block] : 127;
  const AdamW::Rates rates = *args.rates;
  const Place place(args, blocks, block, AdamW::kBlock);
  const uint32_t column = place.column + lane * kEach;

  float grad[kEach], param[kEach], first[kEach], second[kEach];
  Decode(grad_words, args.grad_type, grad);
  Decode(param_words, args.param_type, param);
  Decode(first_words, args.first_type, first);
  Decode(second_words, args.second_type, second);
  const float scale1 = adamw::ScaleOfExponent(exponent1);
  const float scale2 = adamw::ScaleOfExponent(exponent2);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    first[i] = __fmul_rn(first[i], scale1);
    second[i] = __fmul_rn(second[i], scale2);
    adamw::AdvanceMoments(args, rates, grad[i], first[i], second[i]);
  }
  const Range range(first, second);
  // A row's bits are those of its key and the column, whose lowest bits here are the element's.
  const uint32_t key =
      place.row_of_params ^ (args.param_type == DType::kBF16 ? column / 2 : column);
  bool usual = range.IsUsual(args, rates) & (column % kEach == 0);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float root = kCareful ? __fsqrt_rn(second[i]) : UsualRoot(second[i]);
    const float over = adamw::Denominator(args, rates, root);
    const float reciprocal = kCareful ? __frcp_rn(over) : UsualReciprocal(over);
    param[i] =
        adamw::AdvanceParam(args, rates, FromKept(param[i], args.param_type), first[i], reciprocal);
    if (args.root) second[i] = root;
    if (args.param_type == DType::kF32) continue;
    if (args.param_type == DType::kF16) param[i] = __fmul_rn(param[i], Factor(DType::kF16));
    const adamw::Grid grid = GridOf(args.param_type);
    if constexpr (kCareful) {
      const uint32_t bits = adamw::ParamBits(args.param_type, place.row_of_params, column + i);
      param[i] = adamw::RoundStochastically(param[i], grid, bits);
    } else {
      usual &= fabsf(param[i]) <= FLT_MAX;
      if (args.param_type == DType::kF16) usual &= fabsf(param[i]) >= grid.least;
      const uint32_t bits = adamw::ParamBits(args.param_type, key, i);
      param[i] = args.param_type == DType::kBF16 ? adamw::CarryNormal(param[i], grid, bits)
                                                 : adamw::RoundNormal(param[i], grid, bits);
    }
  }
  // Roots sort as what they are of.
  const auto kept = [&](uint32_t bits) {
    const float second = __uint_as_float(bits);
    return !args.root ? second : kCareful ? __fsqrt_rn(second) : UsualRoot(second);
  };
  const Exponents exponents(args, range.most_first, __float_as_uint(kept(range.most_second)));
  if (!kCareful && !__all_sync(~0u, usual)) return false;
  const float inverse1 = scaled1 ? adamw::InverseScale(exponents.first) : 1.0f;
  const float inverse2 = scaled2 ? adamw::InverseScale(exponents.second) : 1.0f;
  // Nearly always; to ask every element whether its step is its own binade's takes a branch each.
  const bool normal = IsNormal(__uint_as_float(range.least_first), inverse1, args.first_type) &
                      IsNormal(kept(range.least_second), inverse2, args.second_type);
  const bool all_normal = __all_sync(~0u, normal);
  // Not sooner, or what is above would wait for it.
  if (!inside || rates.finite == 0) return true;

  Store(param, args.param_type, args.param, offset);
  const auto round = [&](auto known_normal) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const adamw::MomentBits bits = kCareful
                                         ? adamw::BitsOfMoments(place.row_of_moments, column + i)
                                         : adamw::BitsOfMoments(place.row_of_moments ^ column, i);
      first[i] = RoundMoment<known_normal>(__fmul_rn(first[i], inverse1), args.first_type,
                                           args.stochastic, bits.first);
      second[i] = RoundMoment<known_normal>(__fmul_rn(second[i], inverse2), args.second_type,
                                            args.stochastic, bits.second);
    }
  };
  if (!kCareful && all_normal) {
    round(std::true_type());
  } else {
    round(std::false_type());
  }
  Store(first, args.first_type, args.first, offset);
  Store(second, args.second_type, args.second, offset);
  if (lane == 0 && scaled1) args.first_exponents[block] = static_cast<uint8_t>(exponents.first);
  if (lane == 0 && scaled2) args.second_exponents[block] = static_cast<uint8_t>(exponents.second);
  return true;
}

// Apart, so that it is not in the way of what runs nearly always.
template <typename Types>
__device__ __noinline__ void UpdateCarefully(AdamW args, Blocks blocks, uint32_t block,
                                             bool inside) {
  UpdateBlock<Types, true>(args, blocks, block, inside);
}

// Rows of whole blocks. Where there is none left for half a warp, it goes along with the other
// half.
template <typename Types>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) BlocksKernel(AdamW args, Blocks blocks) {
  const uint32_t half = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool inside = half < blocks.count;
  const uint32_t block = inside ? half : blocks.count - 1;
  if (!UpdateBlock<Types, false>(args, blocks, block, inside)) {
    UpdateCarefully<Types>(args, blocks, block, inside);
  }
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
  const uint32_t exponent1 = adamw::ScaleExponent(LargestOf<kWarp>(amax1), args.first_type);
  const uint32_t exponent2 = adamw::ScaleExponent(LargestOf<kWarp>(amax2), args.second_type);
  const float inverse1 = scaled1 ? adamw::InverseScale(exponent1) : 1.0f;
  const float inverse2 = scaled2 ? adamw::InverseScale(exponent2) : 1.0f;
  for (uint32_t i = lane; i < n; i += kWarp) {
    const Element next = advance(i);
    const int64_t at = place.first + i;
    const uint32_t column = place.column + i;
    StoreElement(RoundParam(next.param, args.param_type, place.row_of_params, column),
                 args.param_type, args.param, at);
    const adamw::MomentBits bits = adamw::BitsOfMoments(place.row_of_moments, column);
    StoreMoment(RoundMoment<false>(__fmul_rn(next.first, inverse1), args.first_type,
                                   args.stochastic, bits.first),
                args.first_type, args.first, at);
    StoreMoment(RoundMoment<false>(__fmul_rn(next.second, inverse2), args.second_type,
                                   args.stochastic, bits.second),
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
