// The call of the product of packed codes, common to every platform.
#pragma once

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/packed_gemm.h"

namespace jfp4 {

struct PackedGemmCall {
  static constexpr char kTarget[] = "jfp4_packed_gemm";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()   // a: u8 [..., m, k / 2]
        .template Arg<Buffer>()   // a_scale: f32 [..., m or 1, 1]
        .template Arg<Buffer>()   // b: u8 [..., n, k / 2]
        .template Arg<Buffer>()   // b_scale: f32 [..., 1, n or 1]
        .template Arg<Buffer>()   // bias: f32 [..., n], or absent
        .template Ret<Buffer>();  // y: [..., m, n]
  }

  static ffi::ErrorOr<PackedGemm> Read(Buffer a, Buffer a_scale, Buffer b, Buffer b_scale,
                                       Buffer bias, Output y);
};

inline ffi::ErrorOr<PackedGemm> PackedGemmCall::Read(Buffer a, Buffer a_scale, Buffer b,
                                                     Buffer b_scale, Buffer bias, Output y) {
  Checker check("a", a, 2);
  PackedGemm args{};
  const int64_t bytes = check.dim(1);
  args.batch = check.batch();
  args.m = check.dim(0);
  args.n = check.Size("b", b, 2, 0);
  args.k = 2 * bytes;
  args.a_scale_size = check.Last(a_scale, 2, 0) == 1 ? 1 : args.m;
  args.b_scale_size = check.Last(b_scale, 2, 1) == 1 ? 1 : args.n;
  args.a = check.Take<uint8_t>("a", a, ffi::U8, {args.m, bytes});
  args.b = check.Take<uint8_t>("b", b, ffi::U8, {args.n, bytes});
  if (args.n == 0) check.Refuse("b is " + Describe(b) + "; expected no empty dimension");
  args.a_scale = check.Take<float>("a_scale", a_scale, ffi::F32, {args.a_scale_size, 1});
  args.b_scale = check.Take<float>("b_scale", b_scale, ffi::F32, {1, args.b_scale_size});
  args.bias = check.TakeIfPresent<float>("bias", bias, ffi::F32, args.n);
  args.out_type = check.FloatType("y", *y);
  args.y = check.Take<void>("y", *y, y->element_type(), {args.m, args.n});
  return check.Finish(args);
}

}  // namespace jfp4
