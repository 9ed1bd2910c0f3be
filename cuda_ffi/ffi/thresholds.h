// The call of the order statistics, common to every platform.
#pragma once

#include <limits>

#include "cuda_ffi/ffi/checks.h"
#include "cuda_ffi/kernels/thresholds.h"

namespace jfp4 {

struct ThresholdsCall {
  static constexpr char kTarget[] = "jfp4_thresholds";

  template <typename Context>
  static auto Bind() {
    return ffi::Ffi::Bind()
        .Ctx<Context>()
        .template Arg<Buffer>()  // x: [..., size]
        .template Ret<Buffer>()  // lo: f32 [...]
        .template Ret<Buffer>()  // hi: f32 [...]
        .template Attr<int64_t>("stride")
        .template Attr<int64_t>("count")
        .template Attr<int64_t>("low_rank")
        .template Attr<int64_t>("high_rank");
  }

  static ffi::ErrorOr<Thresholds> Read(Buffer x, Output lo, Output hi, int64_t stride,
                                       int64_t count, int64_t low_rank, int64_t high_rank);
};

inline ffi::ErrorOr<Thresholds> ThresholdsCall::Read(Buffer x, Output lo, Output hi, int64_t stride,
                                                     int64_t count, int64_t low_rank,
                                                     int64_t high_rank) {
  Checker check("x", x, 1);
  Thresholds args{};
  args.x = x.untyped_data();
  args.type = check.FloatType("x", x);
  args.batch = check.batch();
  args.size = check.dim(0);
  args.stride = stride;
  args.count = count;
  args.low_rank = low_rank;
  args.high_rank = high_rank;
  args.lo = check.Take<float>("lo", *lo, ffi::F32, {});
  args.hi = check.Take<float>("hi", *hi, ffi::F32, {});
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();  // ranks are counted in 32 bits
  if (count > kMost) {
    check.Refuse("count is " + std::to_string(count) + "; expected at most " +
                 std::to_string(kMost));
  }
  if (stride < 1 || count < 1 || count - 1 > (args.size - 1) / stride) {
    check.Refuse("stride is " + std::to_string(stride) + " and count " + std::to_string(count) +
                 "; expected positive numbers that stay in x " + Describe(x));
  }
  if (low_rank < 0 || low_rank >= count || high_rank < 0 || high_rank >= count) {
    check.Refuse("low_rank is " + std::to_string(low_rank) + " and high_rank " +
                 std::to_string(high_rank) + "; expected 0 to count - 1, " +
                 std::to_string(count - 1));
  }
  return check.Finish(args);
}

}  // namespace jfp4
