#include "cuda_ffi/host/product.h"

#include <algorithm>

#include "cuda_ffi/host/element.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

double Dot(const float* a, const float* b, int64_t k) {
  constexpr int64_t kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += double{a[i + j]} * b[i + j];
  }
  for (; i < k; ++i) lanes[0] += double{a[i]} * b[i];
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void Multiply(const Gemm& args, const Decoded& codes, xla::ffi::ThreadPool pool) {
  const int64_t m = args.m, n = args.n, k = args.k;
  ParallelFor(pool, args.batch * m, [&](int64_t row) {
    const int64_t batch = row / m;
    const float* a = codes.a.data() + row * k;
    const float* b = codes.b.data() + batch * n * k;
    const float a_scale = args.a_scale[args.a_scale_size == 1 ? batch : row];
    const float* b_scale = args.b_scale + batch * args.b_scale_size;
    std::vector<float> y(n);
    for (int64_t c = 0; c < n; ++c) {
      float v = static_cast<float>(Dot(a, b + c * k, k));
      v = (v * a_scale) * b_scale[args.b_scale_size == 1 ? 0 : c];
      if (args.rank > 0) {
        float term = 0;
        for (int64_t r = 0; r < args.rank; ++r) {
          term += args.u[row * args.rank + r] * args.v[(batch * args.rank + r) * n + c];
        }
        v += term;
      }
      if (args.bias != nullptr) v += args.bias[batch * n + c];
      y[c] = v;
    }
    Store(y.data(), n, args.out_type, args.y, row * n);
  });
}

}  // namespace jfp4::host
