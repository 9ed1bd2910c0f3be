// RMSNorm and its gradient on the CPU.
#include "cuda_ffi/ffi/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda_ffi/host/element.h"
#include "cuda_ffi/host/handler.h"
#include "cuda_ffi/host/parallel.h"

namespace jfp4::host {
namespace {

float Dot(const std::vector<float>& a, const std::vector<float>& b) {
  float sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// mean(x^2) + epsilon.
float MeanSquare(const std::vector<float>& x, float epsilon) {
  return Dot(x, x) / static_cast<float>(x.size()) + epsilon;
}

void NormaliseRow(const RmsNorm& args, int64_t row) {
  const int64_t at = row * args.cols;
  std::vector<float> x(args.cols);
  Load(args.x, args.type, at, args.cols, x.data());
  if (args.added != nullptr) {
    std::vector<float> added(args.cols);
    Load(args.added, args.type, at, args.cols, added.data());
    for (int64_t i = 0; i < args.cols; ++i) x[i] += added[i];
    Store(x.data(), args.cols, args.type, args.sum, at);
    Load(args.sum, args.type, at, args.cols, x.data());
  }
  const float* scale = args.scale + row / args.rows * args.cols;
  const float inverse = 1 / std::sqrt(MeanSquare(x, args.epsilon));
  for (int64_t i = 0; i < args.cols; ++i) x[i] *= inverse * scale[i];
  Store(x.data(), args.cols, args.type, args.y, at);
}

void DifferentiatePart(const RmsNormGradient& args, int64_t index) {
  const int64_t batch = index / args.parts, cols = args.cols;
  const int64_t first = index % args.parts * args.rows_of_part;
  const int64_t last = std::min(first + args.rows_of_part, args.rows);
  const float* scale = args.scale + batch * cols;
  float* dscale = args.dscale + index * cols;
  std::fill(dscale, dscale + cols, 0.0f);
  std::vector<float> x(cols), dy(cols), h(cols), dx(cols);
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = (batch * args.rows + row) * cols;
    Load(args.x, args.type, at, cols, x.data());
    Load(args.dy, args.type, at, cols, dy.data());
    if (args.dsum != nullptr) {
      Load(args.dsum, args.type, at, cols, dx.data());
    } else {
      std::fill(dx.begin(), dx.end(), 0.0f);
    }
    for (int64_t i = 0; i < cols; ++i) h[i] = dy[i] * scale[i];
    const float square = MeanSquare(x, args.epsilon), inverse = 1 / std::sqrt(square);
    const float along = Dot(h, x) / static_cast<float>(cols) / square;
    for (int64_t i = 0; i < cols; ++i) {
      dx[i] += inverse * (h[i] - x[i] * along);
      dscale[i] += dy[i] * (x[i] * inverse);
    }
    Store(dx.data(), cols, args.type, args.dx, at);
  }
}

void RunRmsNorm(const RmsNorm& args, ffi::ThreadPool pool) {
  ParallelFor(pool, args.batch * args.rows, [&](int64_t row) { NormaliseRow(args, row); });
}

void RunRmsNormGradient(const RmsNormGradient& args, ffi::ThreadPool pool) {
  ParallelFor(pool, args.batch * args.parts, [&](int64_t part) { DifferentiatePart(args, part); });
}

}  // namespace
}  // namespace jfp4::host

JFP4_HOST_HANDLER(Jfp4RmsNormCpu, jfp4::RmsNormCall, jfp4::host::RunRmsNorm);
JFP4_HOST_HANDLER(Jfp4RmsNormGradientCpu, jfp4::RmsNormGradientCall,
                  jfp4::host::RunRmsNormGradient);
