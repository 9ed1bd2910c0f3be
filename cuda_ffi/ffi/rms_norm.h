// The calls of RMSNorm and its gradient, common to every platform.
#pragma once

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/rms_norm.h"

namespace jfp4 {

// A tensor of x's type; null, where it may be absent, if it has no columns.
inline void* TakeRows(Checker& check, const char* name, Buffer buffer, Buffer x,
                      bool may_be_absent = false) {
  const ffi::DataType type = x.element_type();
  if (may_be_absent)
    return check.TakeIfPresent<void>(name, buffer, type, check.dim(0), check.dim(1));
  return check.Take<void>(name, buffer, type, {check.dim(0), check.dim(1)});
}

// What both calls are given: x, the scale and epsilon.
template <typename Args>
Args TakeInput(Checker& check, Buffer x, Buffer scale, float epsilon) {
  Args args{};
  args.type = check.FloatType("x", x);
  args.batch = check.batch();
  args.rows = check.dim(0);
  args.cols = check.dim(1);
  if (args.cols > kMaxNormColumns) {
    check.Refuse("x is " + Describe(x) + "; expected at most " + std::to_string(kMaxNormColumns) +
                 " columns");
  }
  args.x = x.untyped_data();
  args.scale = check.Take<float>("scale", scale, ffi::F32, {args.cols});
  args.epsilon = epsilon;
  return args;
}

struct RmsNormCall {
  static constexpr char kTarget[] = "jfp4_rms_norm";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // x: [..., m, d]
        .template Arg<Buffer>()  // added: likewise, or of 0 columns
        .template Arg<Buffer>()  // scale: f32 [..., d]
        .template Ret<Buffer>()  // sum: as added
        .template Ret<Buffer>()  // y: as x
        .template Attr<float>("epsilon");
  }

  static ffi::ErrorOr<RmsNorm> Read(Buffer x, Buffer added, Buffer scale, Output sum, Output y,
                                    float epsilon) {
    Checker check("x", x, 2);
    auto args = TakeInput<RmsNorm>(check, x, scale, epsilon);
    args.added = TakeRows(check, "added", added, x, /*may_be_absent=*/true);
    args.sum = TakeRows(check, "sum", *sum, x, /*may_be_absent=*/true);
    args.y = TakeRows(check, "y", *y, x);
    if ((args.sum == nullptr) != (args.added == nullptr)) {
      check.Refuse("added is " + Describe(added) + " and sum " + Describe(*sum) +
                   "; expected both or neither");
    }
    return check.Finish(args);
  }
};

struct RmsNormGradientCall {
  static constexpr char kTarget[] = "jfp4_rms_norm_gradient";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // x: [..., m, d]
        .template Arg<Buffer>()  // scale: f32 [..., d]
        .template Arg<Buffer>()  // dy: as x
        .template Arg<Buffer>()  // dsum: as x, or of 0 columns
        .template Ret<Buffer>()  // dx: as x
        .template Ret<Buffer>()  // dscale: f32 [..., parts, d]
        .template Attr<float>("epsilon");
  }

  static ffi::ErrorOr<RmsNormGradient> Read(Buffer x, Buffer scale, Buffer dy, Buffer dsum,
                                            Output dx, Output dscale, float epsilon) {
    Checker check("x", x, 2);
    auto args = TakeInput<RmsNormGradient>(check, x, scale, epsilon);
    args.dy = TakeRows(check, "dy", dy, x);
    args.dsum = TakeRows(check, "dsum", dsum, x, /*may_be_absent=*/true);
    args.dx = TakeRows(check, "dx", *dx, x);
    args.parts = std::max<int64_t>(check.Last(*dscale, 2, 0), 1);
    args.rows_of_part = (args.rows + args.parts - 1) / args.parts;
    args.dscale = check.Take<float>("dscale", *dscale, ffi::F32, {args.parts, args.cols});
    return check.Finish(args);
  }
};

}  // namespace jfp4
