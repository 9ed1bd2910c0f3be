// AdamW's step on the CPU.
#include "cuda_ffi/ffi/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda_ffi/host/codes.h"
#include "cuda_ffi/host/element.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

DType AsDType(Moment type) { return type == Moment::kF16 ? DType::kF16 : DType::kF32; }

uint8_t ToE4M3(float v) {
  if (std::isnan(v)) return 0x7F;
  return ByteOfValue<Format::kE4M3>(RoundToFormat<Format::kE4M3>(v));
}

// `count` values of a moment from the offset-th on.
void LoadMoment(const void* from, Moment type, float scale, int64_t offset, int64_t count,
                float* to) {
  if (type == Moment::kE4M3) {
    const auto* bytes = static_cast<const uint8_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = CodeValue(bytes[i], /*e5m2=*/false);
  } else {
    Load(from, AsDType(type), offset, count, to);
  }
  for (int64_t i = 0; i < count; ++i) to[i] *= scale;
}

// Rounds a block's moments, with their scale, and stores them. `bits` are an element's, null to
// round to nearest.
void StoreMoment(float* values, Moment type, const uint32_t* bits, int64_t count, void* to,
                 uint8_t* exponent, int64_t offset) {
  if (type == Moment::kF32) return Store(values, count, DType::kF32, to, offset);
  uint32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) amax = std::max(amax, BitsOf(values[i]) & ~kSignBit);
  *exponent = static_cast<uint8_t>(adamw::ScaleExponent(amax, type));
  const float inverse = adamw::InverseScale(*exponent);
  const adamw::Grid grid = type == Moment::kE4M3 ? adamw::kE4M3Grid : adamw::kF16Grid;
  for (int64_t i = 0; i < count; ++i) {
    values[i] *= inverse;
    if (bits != nullptr) values[i] = adamw::RoundStochastically(values[i], grid, bits[i]);
  }
  if (type == Moment::kF16) return Store(values, count, DType::kF16, to, offset);
  auto* bytes = static_cast<uint8_t*>(to) + offset;
  std::transform(values, values + count, bytes, ToE4M3);
}

// One row of a slice, a block after the other.
void UpdateRow(const AdamW& args, int64_t slice, int64_t row_of_slice) {
  const AdamW::Keys keys = args.keys[slice];
  const auto row_key = [&](uint32_t key) {
    return adamw::Mix(static_cast<uint32_t>(row_of_slice) + key);
  };
  const float factor = args.param_type == DType::kF16 ? 0x1p10f : 1.0f;
  const adamw::Grid grid = args.param_type == DType::kBF16 ? adamw::kBF16Grid : adamw::kF16Grid;
  const int64_t size = args.block(), row = slice * args.rows + row_of_slice;
  std::vector<float> grad(size), param(size), first(size), second(size);
  std::vector<uint32_t> first_bits(size), second_bits(size);
  for (int64_t column = 0; column < args.n; column += size) {
    const int64_t offset = row * args.n + column, block = offset / size;
    const auto scale = [&](Moment type, const uint8_t* exponents) {
      return type == Moment::kF32 ? 1.0f : adamw::ScaleOfExponent(exponents[block]);
    };
    Load(args.grad, args.grad_type, offset, size, grad.data());
    Load(args.param, args.param_type, offset, size, param.data());
    LoadMoment(args.first, args.first_type, scale(args.first_type, args.first_exponents), offset,
               size, first.data());
    LoadMoment(args.second, args.second_type, scale(args.second_type, args.second_exponents),
               offset, size, second.data());
    for (int64_t i = 0; i < size; ++i) {
      const auto of_tensor = static_cast<uint32_t>(column + i) + keys.column;
      const adamw::Element next = adamw::Advance(args, *args.rates, grad[i],
                                                 {param[i] * (1 / factor), first[i], second[i]});
      param[i] = next.param;
      if (args.param_type != DType::kF32) {
        const uint32_t bits = adamw::ParamBits(args.param_type, row_key(keys.param), of_tensor);
        param[i] = adamw::RoundStochastically(next.param * factor, grid, bits);
      }
      const adamw::MomentBits bits = adamw::BitsOfMoments(row_key(keys.moments), of_tensor);
      first_bits[i] = bits.first;
      second_bits[i] = bits.second;
      first[i] = next.first;
      second[i] = next.second;
    }
    Store(param.data(), size, args.param_type, args.param, offset);
    StoreMoment(first.data(), args.first_type, args.stochastic ? first_bits.data() : nullptr, size,
                args.first, args.first_exponents + block, offset);
    StoreMoment(second.data(), args.second_type, args.stochastic ? second_bits.data() : nullptr,
                size, args.second, args.second_exponents + block, offset);
  }
}

void RunAdamW(const AdamWParts& parts, ffi::ThreadPool pool) {
  if (parts.front().rates->finite == 0) return;
  const int64_t rows = parts.front().rows, rows_of_part = parts.front().slices * rows;
  ParallelFor(pool, static_cast<int64_t>(parts.size()) * rows_of_part, [&](int64_t row) {
    const int64_t of_part = row % rows_of_part;
    UpdateRow(parts[row / rows_of_part], of_part / rows, of_part % rows);
  });
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4AdamwCpu, jfp4::AdamWCall, jfp4::host::RunAdamW);
