// The call of the product of byte codes, common to every platform.
#pragma once

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/gemm.h"

namespace jfp4 {

struct GemmCall {
  static constexpr char kTarget[] = "jfp4_gemm";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // a: [..., m, k]
        .template Arg<Buffer>()  // a_scale: f32 [..., m or 1, 1]
        .template Arg<Buffer>()  // b: [..., n, k]
        .template Arg<Buffer>()  // b_scale: f32 [..., 1, n or 1]
        .template Arg<Buffer>()  // u: f32 [..., m, rank]
        .template Arg<Buffer>()  // v: f32 [..., rank, n]
        .template Arg<Buffer>()  // bias: f32 [..., n], or absent
        .template Arg<Buffer>()  // slope_w: [..., m, n], or absent
        .template Arg<Buffer>()  // slope_scale: f32 [..., 1, n or 1]
        .template Ret<Buffer>()  // y: [..., m, n]
        .template Ret<Buffer>()  // counter: u32 [..., 4], scratch
        .template Attr<bool>("promote")
        .template Attr<float>("slope_k")
        .template Attr<float>("slope_cap");
  }

  static ffi::ErrorOr<Gemm> Read(Buffer a, Buffer a_scale, Buffer b, Buffer b_scale, Buffer u,
                                 Buffer v, Buffer bias, Buffer slope_w, Buffer slope_scale,
                                 Output y, Output counter, bool promote, float slope_k,
                                 float slope_cap);
};

inline ffi::ErrorOr<Gemm> GemmCall::Read(Buffer a, Buffer a_scale, Buffer b, Buffer b_scale,
                                         Buffer u, Buffer v, Buffer bias, Buffer slope_w,
                                         Buffer slope_scale, Output y, Output counter, bool promote,
                                         float slope_k, float slope_cap) {
  Checker check("a", a, 2);
  Gemm args{};
  args.batch = check.batch();
  args.m = check.dim(0);
  args.k = check.dim(1);
  args.n = check.Size("b", b, 2, 0);
  args.rank = check.Size("u", u, 2, 1);
  args.a_scale_size = check.Last(a_scale, 2, 0) == 1 ? 1 : args.m;
  args.b_scale_size = check.Last(b_scale, 2, 1) == 1 ? 1 : args.n;
  args.a_e5m2 = check.IsE5M2("a", a);
  args.b_e5m2 = check.IsE5M2("b", b);
  if (args.a_e5m2 && args.b_e5m2) {
    check.Refuse("a and b are both f8e5m2; expected one of them at most");
  }
  args.a = static_cast<const uint8_t*>(a.untyped_data());
  args.b = check.Take<uint8_t>("b", b, b.element_type(), {args.n, args.k});
  if (args.n == 0) check.Refuse("b is " + Describe(b) + "; expected no empty dimension");
  args.a_scale = check.Take<float>("a_scale", a_scale, ffi::F32, {args.a_scale_size, 1});
  args.b_scale = check.Take<float>("b_scale", b_scale, ffi::F32, {1, args.b_scale_size});
  args.u = check.Take<float>("u", u, ffi::F32, {args.m, args.rank});
  args.v = check.Take<float>("v", v, ffi::F32, {args.rank, args.n});
  args.bias = check.TakeIfPresent<float>("bias", bias, ffi::F32, args.n);
  Slope& slope = args.slope;
  slope.type = check.FloatType("slope_w", slope_w);
  slope.w = check.TakeIfPresent<void>("slope_w", slope_w, slope_w.element_type(), args.m, args.n);
  slope.scale_size = check.Last(slope_scale, 2, 1) == 1 ? 1 : args.n;
  slope.scale = check.Take<float>("slope_scale", slope_scale, ffi::F32, {1, slope.scale_size});
  slope.k = slope_k;
  slope.cap = slope_cap;
  if (slope.w != nullptr && !(slope_k > 1 && slope_cap > 0)) {
    check.Refuse("slope_k is " + std::to_string(slope_k) + " and slope_cap " +
                 std::to_string(slope_cap) + "; expected them above 1 and 0");
  }
  args.out_type = check.FloatType("y", *y);
  args.y = check.Take<void>("y", *y, y->element_type(), {args.m, args.n});
  args.promote = promote;
  args.counter = check.TakeCounter("counter", *counter);
  return check.Finish(args);
}

}  // namespace jfp4
