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
        .template Ret<Buffer>()  // y: [..., m, n]
        .template Attr<bool>("promote");
  }

  static ffi::ErrorOr<Gemm> Read(Buffer a, Buffer a_scale, Buffer b, Buffer b_scale, Buffer u,
                                 Buffer v, Buffer bias, Output y, bool promote);
};

inline ffi::ErrorOr<Gemm> GemmCall::Read(Buffer a, Buffer a_scale, Buffer b, Buffer b_scale,
                                         Buffer u, Buffer v, Buffer bias, Output y, bool promote) {
  Checker check("a", a, 2);
  Gemm args{};
  args.batch = check.batch();
  args.m = check.dim(0);
  args.k = check.dim(1);
  args.n = check.Last(b, 2, 0);
  args.rank = check.Last(u, 2, 1);
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
  args.out_type = check.FloatType("y", *y);
  args.y = check.Take<void>("y", *y, y->element_type(), {args.m, args.n});
  args.promote = promote;
  return check.Finish(args);
}

}  // namespace jfp4
