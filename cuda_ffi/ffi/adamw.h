// The call of AdamW's step, common to every platform.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/adamw.h"

namespace jfp4 {

// A step, by the parts of the leading dimension that its gradient comes in.
using AdamWParts = std::vector<AdamW>;

struct AdamWCall {
  static constexpr char kTarget[] = "jfp4_adamw";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // param: [..., n]
        .template Arg<Buffer>()  // first: likewise, u8 (E4M3), f16 or f32
        .template Arg<Buffer>()  // first_exponents: u8 [..., n / block], or of 0 columns
        .template Arg<Buffer>()  // second: likewise, f16 or f32
        .template Arg<Buffer>()  // second_exponents
        .template Arg<Buffer>()  // rates: f32 [5], see AdamW::Rates
        .template Arg<Buffer>()  // keys: u32 [slices, 3], see AdamW::Keys
        .RemainingArgs()         // grad: as param in one, or as many as divide its slices
        .template Ret<Buffer>()  // param, in the operand's own memory, as are the others
        .template Ret<Buffer>()  // first
        .template Ret<Buffer>()  // first_exponents
        .template Ret<Buffer>()  // second
        .template Ret<Buffer>()  // second_exponents
        .template Attr<float>("b1")
        .template Attr<float>("rest1")
        .template Attr<float>("b2")
        .template Attr<float>("rest2")
        .template Attr<float>("eps")
        .template Attr<float>("weight_decay")
        .template Attr<float>("bound")
        .template Attr<bool>("root")
        .template Attr<bool>("stochastic");
  }

  static ffi::ErrorOr<AdamWParts> Read(Buffer param, Buffer first, Buffer first_exponents,
                                       Buffer second, Buffer second_exponents, Buffer rates,
                                       Buffer keys, ffi::RemainingArgs grads, Output new_param,
                                       Output new_first, Output new_first_exponents,
                                       Output new_second, Output new_second_exponents, float b1,
                                       float rest1, float b2, float rest2, float eps,
                                       float weight_decay, float bound, bool root, bool stochastic);
};

inline ffi::ErrorOr<AdamWParts> AdamWCall::Read(
    Buffer param, Buffer first, Buffer first_exponents, Buffer second, Buffer second_exponents,
    Buffer rates, Buffer keys, ffi::RemainingArgs grads, Output new_param, Output new_first,
    Output new_first_exponents, Output new_second, Output new_second_exponents, float b1,
    float rest1, float b2, float rest2, float eps, float weight_decay, float bound, bool root,
    bool stochastic) {
  const size_t rank = param.dimensions().size();
  Checker check("param", param, rank);  // a whole tensor is one call: no dimension is a batch's
  AdamWParts parts;
  AdamW args{};
  if (rank == 0) {
    check.Refuse("param is " + Describe(param) + "; expected at least one dimension");
    return check.Finish(parts);
  }
  args.n = check.dim(rank - 1);
  if (args.n == 0) return check.Finish(parts);  // the check has refused it
  args.slices = keys.dimensions().size() == 2 ? keys.dimensions()[0] : 0;
  const int64_t rows = static_cast<int64_t>(param.element_count()) / std::max<int64_t>(args.n, 1);
  if (args.slices == 0 || rows % args.slices != 0) {
    check.Refuse("keys is " + Describe(keys) + "; expected u32[slices, 3] of slices that divide " +
                 "the rows of param " + Describe(param));
    return check.Finish(parts);
  }
  args.rows = rows / args.slices;
  const auto moment_type = [&](const std::string& name, Buffer buffer) {
    const ffi::DataType type = buffer.element_type();
    const bool may_be_e4m3 = name == "first";
    if (type == ffi::U8 && may_be_e4m3) return Moment::kE4M3;
    if (type == ffi::F16) return Moment::kF16;
    if (type != ffi::F32) {
      check.Refuse(name + " is " + Describe(buffer) + "; expected " + (may_be_e4m3 ? "u8, " : "") +
                   "f16 or f32");
    }
    return Moment::kF32;
  };
  // An operand of param's shape, but for its last dimension, and its result in the same memory.
  const auto take = [&](const std::string& name, Buffer buffer, Buffer result, int64_t columns) {
    std::vector<int64_t> expected(param.dimensions().begin(), param.dimensions().end());
    expected.back() = columns;
    for (Buffer part : {buffer, result}) {
      const auto dims = part.dimensions();
      if (part.element_type() != buffer.element_type() ||
          !std::equal(dims.begin(), dims.end(), expected.begin(), expected.end())) {
        check.Refuse(name + " is " + Describe(part) + "; expected " +
                     Describe(buffer.element_type(), expected) + ", beside param " +
                     Describe(param));
      }
    }
    if (buffer.untyped_data() != result.untyped_data() && columns != 0) {
      check.Refuse(name + "'s result is elsewhere; expected it in the operand's memory");
    }
    return buffer.untyped_data();
  };
  const int64_t scales = args.n / args.block();
  const auto take_moment = [&](const std::string& name, Buffer buffer, Buffer exponents,
                               Buffer result, Buffer new_exponents, Moment* type, uint8_t** to) {
    *type = moment_type(name, buffer);
    if (exponents.element_type() != ffi::U8) {
      check.Refuse(name + "_exponents is " + Describe(exponents) + "; expected u8");
    }
    *to = static_cast<uint8_t*>(
        take(name + "_exponents", exponents, new_exponents, *type == Moment::kF32 ? 0 : scales));
    return take(name, buffer, result, args.n);
  };
  args.param = take("param", param, *new_param, args.n);
  args.param_type = check.FloatType("param", param);
  args.first = take_moment("first", first, first_exponents, *new_first, *new_first_exponents,
                           &args.first_type, &args.first_exponents);
  args.second = take_moment("second", second, second_exponents, *new_second, *new_second_exponents,
                            &args.second_type, &args.second_exponents);
  static_assert(sizeof(AdamW::Rates) == 5 * sizeof(float));
  static_assert(sizeof(AdamW::Keys) == 3 * sizeof(uint32_t));
  args.rates = static_cast<const AdamW::Rates*>(rates.untyped_data());
  if (rates.element_type() != ffi::F32 || rates.element_count() != 5) {
    check.Refuse("rates is " + Describe(rates) + "; expected f32[5]");
  }
  args.keys = static_cast<const AdamW::Keys*>(keys.untyped_data());
  if (keys.element_type() != ffi::U32 || keys.dimensions()[1] != 3) {
    check.Refuse("keys is " + Describe(keys) + "; expected u32[slices, 3]");
  }
  args.b1 = b1;
  args.rest1 = rest1;
  args.b2 = b2;
  args.rest2 = rest2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.bound = std::isinf(bound) ? 0 : bound;
  args.slack = std::isinf(bound) ? bound : 0;
  args.root = root;
  args.stochastic = stochastic;

  const int64_t count = static_cast<int64_t>(grads.size());
  if (count == 0 || args.slices % count != 0) {
    check.Refuse("grad is in " + std::to_string(count) + " parts; expected a number that divides " +
                 "the slices of keys " + Describe(keys));
    return check.Finish(parts);
  }
  args.slices /= count;
  const int64_t elements = args.slices * args.rows * args.n;
  // Where the next part of a buffer begins.
  const auto next = [&](auto* at, Buffer buffer) {
    return at + static_cast<int64_t>(buffer.size_bytes()) / count / sizeof(*at);
  };
  for (int64_t i = 0; i < count; ++i) {
    const ffi::ErrorOr<Buffer> grad = grads.get<Buffer>(i);
    if (grad.has_error()) return Refusal<AdamWParts>(grad.error());
    const auto dims = grad->dimensions();
    if (static_cast<int64_t>(grad->element_count()) != elements || dims.size() == 0 ||
        dims.back() != args.n) {
      check.Refuse("grad is " + Describe(*grad) + ", in part " + std::to_string(i) + " of " +
                   std::to_string(count) + "; expected " + std::to_string(elements / args.n) +
                   " rows of " + std::to_string(args.n) + ", beside param " + Describe(param));
    }
    args.grad = grad->untyped_data();
    args.grad_type = check.FloatType("grad", *grad);
    parts.push_back(args);
    args.param = next(static_cast<char*>(args.param), param);
    args.first = next(static_cast<char*>(args.first), first);
    args.first_exponents = next(args.first_exponents, first_exponents);
    args.second = next(static_cast<char*>(args.second), second);
    args.second_exponents = next(args.second_exponents, second_exponents);
    args.keys = next(args.keys, keys);
  }
  return check.Finish(parts);
}

}  // namespace jfp4
