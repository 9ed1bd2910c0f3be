// The calls of the quantisers, common to every platform: their buffers, and the checks of these.
#pragma once

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/quantize.h"

namespace jfp4 {

struct QuantizeRowsCall {
  static constexpr char kTarget[] = "jfp4_quantize_rows";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // x: [..., m, k]
        .template Arg<Buffer>()  // lo: f32 [..., 1], or absent
        .template Arg<Buffer>()  // hi: f32 [..., 1], or absent
        .template Arg<Buffer>()  // amax_floor: f32 [..., m], or absent
        .template Ret<Buffer>()  // codes: [..., m, k], or absent
        .template Ret<Buffer>()  // codes_t: [..., k, m], or absent
        .template Ret<Buffer>()  // packed: u8 [..., m, ceil(k / 2)], or absent
        .template Ret<Buffer>()  // scale: f32 [..., m, 1]
        .template Attr<int32_t>("format");
  }

  static ffi::ErrorOr<QuantizeRows> Read(Buffer x, Buffer lo, Buffer hi, Buffer amax_floor,
                                         Output codes, Output codes_t, Output packed, Output scale,
                                         int32_t format);
};

struct QuantizeColumnsCall {
  static constexpr char kTarget[] = "jfp4_quantize_columns";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // x: [..., k, n]
        .template Arg<Buffer>()  // lo: f32 [..., 1], or absent
        .template Arg<Buffer>()  // hi: f32 [..., 1], or absent
        .template Arg<Buffer>()  // amax_floor: f32 [..., n], or absent
        .template Ret<Buffer>()  // codes: [..., k, n], or absent
        .template Ret<Buffer>()  // codes_t: [..., n, k], or absent
        .template Ret<Buffer>()  // packed_t: u8 [..., n, ceil(k / 2)], or absent
        .template Ret<Buffer>()  // scale: f32 [..., 1, n]
        .template Ret<Buffer>()  // amax: f32 [..., n], scratch
        .template Attr<int32_t>("format");
  }

  static ffi::ErrorOr<QuantizeColumns> Read(Buffer x, Buffer lo, Buffer hi, Buffer amax_floor,
                                            Output codes, Output codes_t, Output packed_t,
                                            Output scale, Output amax, int32_t format);
};

struct GradientAmaxCall {
  static constexpr char kTarget[] = "jfp4_gradient_amax";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()   // dy: [..., m, n]
        .template Arg<Buffer>()   // col_factor: f32 [..., 1, n]
        .template Arg<Buffer>()   // row_factor: f32 [..., m, 1]
        .template Ret<Buffer>()   // row_amax: f32 [..., m, 1]
        .template Ret<Buffer>()   // col_amax: f32 [..., 1, n]
        .template Ret<Buffer>();  // counter: u32 [..., 4], scratch
  }

  static ffi::ErrorOr<GradientAmax> Read(Buffer dy, Buffer col_factor, Buffer row_factor,
                                         Output row_amax, Output col_amax, Output counter);
};

struct QuantizeGradientCall {
  static constexpr char kTarget[] = "jfp4_quantize_gradient";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // dy: [..., m, n]
        .template Arg<Buffer>()  // col_factor: f32 [..., 1, n]
        .template Arg<Buffer>()  // row_factor: f32 [..., m, 1]
        .template Arg<Buffer>()  // row_amax: f32 [..., m, 1]
        .template Arg<Buffer>()  // col_amax: f32 [..., 1, n]
        .template Ret<Buffer>()  // codes: [..., m, n]
        .template Ret<Buffer>()  // row_scale: f32 [..., m, 1]
        .template Ret<Buffer>()  // codes_t: [..., n, m]
        .template Ret<Buffer>()  // col_scale: f32 [..., 1, n]
        .template Attr<int32_t>("format");
  }

  static ffi::ErrorOr<QuantizeGradient> Read(Buffer dy, Buffer col_factor, Buffer row_factor,
                                             Buffer row_amax, Buffer col_amax, Output codes,
                                             Output row_scale, Output codes_t, Output col_scale,
                                             int32_t format);
};

inline Outliers CheckOutliers(Checker& check, Buffer lo, Buffer hi, Format format) {
  Outliers outliers;
  outliers.lo = check.TakeIfPresent<float>("lo", lo, ffi::F32, 1);
  outliers.hi = check.TakeIfPresent<float>("hi", hi, ffi::F32, 1);
  if ((outliers.lo == nullptr) != (outliers.hi == nullptr)) {
    check.Refuse("lo is " + Describe(lo) + " and hi " + Describe(hi) +
                 "; expected both or neither to be present");
  }
  if (outliers.lo != nullptr && format >= Format::kE4M3) {
    check.Refuse("lo and hi are present; expected neither, or a 4-bit format");
  }
  return outliers;
}

inline void CheckPacked(Checker& check, const char* name, const uint8_t* packed, Format format,
                        const Outliers& outliers) {
  if (packed == nullptr || (format == Format::kE2M1 && outliers.lo == nullptr)) return;
  check.Refuse(std::string(name) + " is present; expected format E2M1 without lo and hi");
}

inline ffi::ErrorOr<QuantizeRows> QuantizeRowsCall::Read(Buffer x, Buffer lo, Buffer hi,
                                                         Buffer amax_floor, Output codes,
                                                         Output codes_t, Output packed,
                                                         Output scale, int32_t format) {
  Checker check("x", x, 2);
  const int64_t m = check.dim(0), k = check.dim(1);
  QuantizeRows args{};
  args.in = {x.untyped_data(), check.FloatType("x", x), check.batch(), m, k};
  args.format = CheckFormat(check, format);
  args.outliers = CheckOutliers(check, lo, hi, args.format);
  const ffi::DataType type = CodeType(args.format);
  args.codes = check.TakeIfPresent<uint8_t>("codes", *codes, type, m, k);
  args.codes_t = check.TakeIfPresent<uint8_t>("codes_t", *codes_t, type, k, m);
  args.packed = check.TakeIfPresent<uint8_t>("packed", *packed, ffi::U8, m, (k + 1) / 2);
  args.scale = check.Take<float>("scale", *scale, ffi::F32, {m, 1});
  args.amax_floor = check.TakeIfPresent<float>("amax_floor", amax_floor, ffi::F32, m);
  CheckPacked(check, "packed", args.packed, args.format, args.outliers);
  return check.Finish(args);
}

inline ffi::ErrorOr<QuantizeColumns> QuantizeColumnsCall::Read(Buffer x, Buffer lo, Buffer hi,
                                                               Buffer amax_floor, Output codes,
                                                               Output codes_t, Output packed_t,
                                                               Output scale, Output amax,
                                                               int32_t format) {
  Checker check("x", x, 2);
  const int64_t k = check.dim(0), n = check.dim(1);
  QuantizeColumns args{};
  args.in = {x.untyped_data(), check.FloatType("x", x), check.batch(), k, n};
  args.format = CheckFormat(check, format);
  args.outliers = CheckOutliers(check, lo, hi, args.format);
  const ffi::DataType type = CodeType(args.format);
  args.codes = check.TakeIfPresent<uint8_t>("codes", *codes, type, k, n);
  args.codes_t = check.TakeIfPresent<uint8_t>("codes_t", *codes_t, type, n, k);
  args.packed_t = check.TakeIfPresent<uint8_t>("packed_t", *packed_t, ffi::U8, n, (k + 1) / 2);
  args.scale = check.Take<float>("scale", *scale, ffi::F32, {1, n});
  args.amax = check.Take<float>("amax", *amax, ffi::F32, {n});
  args.amax_floor = check.TakeIfPresent<float>("amax_floor", amax_floor, ffi::F32, n);
  CheckPacked(check, "packed_t", args.packed_t, args.format, args.outliers);
  return check.Finish(args);
}

inline ffi::ErrorOr<GradientAmax> GradientAmaxCall::Read(Buffer dy, Buffer col_factor,
                                                         Buffer row_factor, Output row_amax,
                                                         Output col_amax, Output counter) {
  Checker check("dy", dy, 2);
  const int64_t m = check.dim(0), n = check.dim(1);
  GradientAmax args{};
  args.in = {dy.untyped_data(), check.FloatType("dy", dy), check.batch(), m, n};
  args.col_factor = check.Take<float>("col_factor", col_factor, ffi::F32, {1, n});
  args.row_factor = check.Take<float>("row_factor", row_factor, ffi::F32, {m, 1});
  args.row_amax = check.Take<float>("row_amax", *row_amax, ffi::F32, {m, 1});
  args.col_amax = check.Take<float>("col_amax", *col_amax, ffi::F32, {1, n});
  args.counters = check.TakeCounter("counter", *counter);
  return check.Finish(args);
}

inline ffi::ErrorOr<QuantizeGradient> QuantizeGradientCall::Read(Buffer dy, Buffer col_factor,
                                                                 Buffer row_factor, Buffer row_amax,
                                                                 Buffer col_amax, Output codes,
                                                                 Output row_scale, Output codes_t,
                                                                 Output col_scale, int32_t format) {
  Checker check("dy", dy, 2);
  const int64_t m = check.dim(0), n = check.dim(1);
  QuantizeGradient args{};
  args.in = {dy.untyped_data(), check.FloatType("dy", dy), check.batch(), m, n};
  args.format = CheckFormat(check, format);
  const ffi::DataType type = CodeType(args.format);
  args.col_factor = check.Take<float>("col_factor", col_factor, ffi::F32, {1, n});
  args.row_factor = check.Take<float>("row_factor", row_factor, ffi::F32, {m, 1});
  args.codes = check.Take<uint8_t>("codes", *codes, type, {m, n});
  args.row_scale = check.Take<float>("row_scale", *row_scale, ffi::F32, {m, 1});
  args.codes_t = check.Take<uint8_t>("codes_t", *codes_t, type, {n, m});
  args.col_scale = check.Take<float>("col_scale", *col_scale, ffi::F32, {1, n});
  args.row_amax = check.Take<float>("row_amax", row_amax, ffi::F32, {m, 1});
  args.col_amax = check.Take<float>("col_amax", col_amax, ffi::F32, {1, n});
  return check.Finish(args);
}

}  // namespace jfp4
