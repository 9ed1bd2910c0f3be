// Order statistics of a sample on the CPU.
#include "cuda_ffi/ffi/thresholds.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda_ffi/host/element.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

// Bit patterns, read as integers with the negative ones flipped, sort as the numbers do; the flip
// is its own inverse.
int32_t Flip(int32_t pattern) { return pattern < 0 ? pattern ^ 0x7FFFFFFF : pattern; }

void Select(const Thresholds& args, int64_t batch) {
  std::vector<int32_t> keys(args.count);
  bool any_nan = false;
  for (int64_t i = 0; i < args.count; ++i) {
    float v;
    Load(args.x, args.type, batch * args.size + i * args.stride, 1, &v);
    any_nan |= std::isnan(v);
    keys[i] = Flip(static_cast<int32_t>(BitsOf(v)));
  }
  const auto at = [&](int64_t rank, int64_t sorted) {
    // What lies before `sorted` is known to be no greater than what follows.
    std::nth_element(keys.begin() + sorted, keys.begin() + rank, keys.end());
    return any_nan ? std::nanf("") : FromBits(static_cast<uint32_t>(Flip(keys[rank])));
  };
  args.lo[batch] = at(args.low_rank, 0);
  args.hi[batch] = at(args.high_rank, args.high_rank < args.low_rank ? 0 : args.low_rank);
}

void RunThresholds(const Thresholds& args, ffi::ThreadPool pool) {
  ParallelFor(pool, args.batch, [&](int64_t batch) { Select(args, batch); });
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4ThresholdsCpu, jfp4::ThresholdsCall, jfp4::host::RunThresholds);
