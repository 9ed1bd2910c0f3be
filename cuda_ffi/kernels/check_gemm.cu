// Checks the FP8 product without Python or XLA: every element of y against sums in double, bit for
// bit, for E2M1 codes; times the slope, to within its error. Small enough for compute-sanitizer.
// Exit status 1 on a mismatch.
//
//   cmake -S . -B build && cmake --build build --target check_gemm
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_ffi/kernels/gemm.h"

namespace {

using namespace jfp4;

constexpr float kSlopeK = 5, kSlopeCap = 3;

struct Case {
  int batch, m, n, k;
  DType out;
  bool a_e5m2, b_e5m2, promote, row_scales, bias;
  int rank;
  bool slope = false;
};

void Require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}

template <typename T>
T* ToDevice(const std::vector<T>& host) {
  T* device;
  Require(cudaMalloc(&device, host.size() * sizeof(T) + 1), "cudaMalloc");
  Require(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyDefault), "copy");
  return device;
}

// E2M1 codes of a Gaussian, or of its magnitude, as bytes of the wanted type; `values` gets the
// numbers.
std::vector<uint8_t> Codes(size_t size, bool e5m2, bool one_sided, std::mt19937& random,
                           std::vector<float>* values) {
  static const float kGrid[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  std::normal_distribution<float> normal(0, 1.7);
  std::vector<uint8_t> bytes(size);
  values->resize(size);
  for (size_t i = 0; i < size; ++i) {
    float x = normal(random), nearest = 0;
    for (float g : kGrid) {
      if (std::fabs(std::fabs(x) - g) < std::fabs(std::fabs(x) - nearest)) nearest = g;
    }
    if (x < 0 && !one_sided) nearest = -nearest;
    (*values)[i] = nearest;
    bytes[i] = __nv_cvt_float_to_fp8(nearest, __NV_SATFINITE, e5m2 ? __NV_E5M2 : __NV_E4M3);
  }
  return bytes;
}

std::vector<float> Scales(size_t size, std::mt19937& random) {
  std::vector<float> values(size);
  for (float& v : values) v = std::exp(std::normal_distribution<float>()(random));
  return values;
}

bool Check(const Case& c) {
  std::mt19937 random(c.m + 7 * c.n + 31 * c.k + c.rank);
  std::vector<float> a, b;
  const size_t bm = size_t(c.batch) * c.m, bn = size_t(c.batch) * c.n;
  const auto a_codes = Codes(bm * c.k, c.a_e5m2, c.promote, random, &a);
  const auto b_codes = Codes(bn * c.k, c.b_e5m2, c.promote, random, &b);
  const auto a_scale = Scales(c.row_scales ? bm : c.batch, random);
  const auto b_scale = Scales(c.row_scales ? bn : c.batch, random);
  const auto u = Scales(bm * c.rank, random), v = Scales(bn * c.rank, random);
  const auto bias = Scales(bn, random), slope_scale = Scales(bn, random);
  std::vector<float> w(bm * c.n);
  for (float& x : w) x = std::normal_distribution<float>(0, 4)(random);
  const int width = c.out == DType::kF32 ? 4 : 2;
  std::vector<uint8_t> y(bm * c.n * width);
  Gemm g{
      c.batch,
      c.m,
      c.n,
      c.k,
      ToDevice(a_codes),
      c.a_e5m2,
      ToDevice(b_codes),
      c.b_e5m2,
      ToDevice(a_scale),
      c.row_scales ? c.m : 1,
      ToDevice(b_scale),
      c.row_scales ? c.n : 1,
      ToDevice(u),
      ToDevice(v),
      c.rank,
      c.bias ? ToDevice(bias) : nullptr,
      {c.slope ? ToDevice(w) : nullptr, DType::kF32, ToDevice(slope_scale), c.n, kSlopeK,
       kSlopeCap},
      ToDevice(y),
      c.out,
      c.promote,
      reinterpret_cast<TileCounter*>(ToDevice(std::vector<uint32_t>(kCounterWords, 0xA5A5A5A5)))};
  // A second time with the counter as the first has left it.
  for (int launch = 0; launch < 2; ++launch) {
    Require(cudaMemset(g.y, 0xA5, y.size()), "poison");
    Require(LaunchGemm(g, nullptr), "LaunchGemm");
  }
  Require(cudaDeviceSynchronize(), "GemmKernel");
  Require(cudaMemcpy(y.data(), g.y, y.size(), cudaMemcpyDefault), "copy");

  size_t wrong = 0;
  for (int batch = 0; batch < c.batch; ++batch) {
    for (int i = 0; i < c.m; ++i) {
      for (int j = 0; j < c.n; ++j) {
        const size_t row = size_t(batch) * c.m + i, col = size_t(batch) * c.n + j;
        double sum = 0;
        for (int k = 0; k < c.k; ++k) sum += double(a[row * c.k + k]) * b[col * c.k + k];
        float want = float(sum) * a_scale[c.row_scales ? row : batch];
        want *= b_scale[c.row_scales ? col : batch];
        for (int r = 0; r < c.rank; ++r) {
          want += u[row * c.rank + r] * v[(size_t(batch) * c.rank + r) * c.n + j];
        }
        if (c.bias) want += bias[col];
        if (c.slope) {
          // Not the same logarithm: to within what slope.h says, and two roundings.
          want *= SlopeAt(w[row * c.n + j] * (1 / slope_scale[col]), kSlopeK, kSlopeCap);
          float got;
          std::memcpy(&got, &y[(row * c.n + j) * width], sizeof(got));
          if (std::fabs(got - want) <= 0x1.2p-20 * std::fabs(want)) continue;
        }
        uint32_t want_bits = 0, got_bits = 0;
        if (c.out == DType::kF32) {
          std::memcpy(&want_bits, &want, 4);
        } else if (c.out == DType::kBF16) {
          const __nv_bfloat16 rounded = __float2bfloat16_rn(want);
          std::memcpy(&want_bits, &rounded, 2);
        } else {
          const __half rounded = __float2half_rn(want);
          std::memcpy(&want_bits, &rounded, 2);
        }
        std::memcpy(&got_bits, &y[(row * c.n + j) * width], width);
        if (want_bits != got_bits && wrong++ < 3) {
          std::printf("  [%d, %d, %d]: got %08x, want %08x\n", batch, i, j, got_bits, want_bits);
        }
      }
    }
  }
  std::printf(
      "%s gemm batch=%d m=%d n=%d k=%d out=%d a_e5m2=%d b_e5m2=%d promote=%d rank=%d slope=%d: "
      "%zu\n",
      wrong ? "MISMATCH" : "ok", c.batch, c.m, c.n, c.k, int(c.out), c.a_e5m2, c.b_e5m2, c.promote,
      c.rank, c.slope, wrong);
  for (const void* p :
       {(const void*)g.a, (const void*)g.b, (const void*)g.a_scale, (const void*)g.b_scale,
        (const void*)g.u, (const void*)g.v, (const void*)g.bias, g.slope.w,
        (const void*)g.slope.scale, (const void*)g.y, (const void*)g.counter}) {
    cudaFree(const_cast<void*>(p));
  }
  return wrong == 0;
}

}  // namespace

int main() {
  bool ok = true;
  const DType kOut[] = {DType::kBF16, DType::kF16, DType::kF32};
  int i = 0;
  const int kShapes[][3] = {{1, 1, 16},      {127, 129, 144},  {128, 256, 128}, {256, 512, 1024},
                            {300, 520, 400}, {513, 200, 2048}, {64, 1000, 5120}};
  // As many tiles that blocks take several: of medium width, wide and then narrow ones, wide ones.
  const int kManyTiles[][3] = {{2048, 5120, 32}, {4096, 5120, 16}, {4096, 9216, 16}};
  for (bool promote : {false, true}) {
    for (auto [m, n, k] : kShapes) {
      ok &= Check({1, m, n, k, kOut[i % 3], false, false, promote, i % 2 == 0, i % 3 == 0, i % 3});
      ok &= Check({2, m, n, k, kOut[(i + 1) % 3], i % 2 == 0, i % 2 == 1, promote, true, true, 0});
      if (m > 1)
        ok &= Check({2, m, n, k, DType::kF32, false, false, promote, true, false, 0, true});
      ++i;
    }
  }
  for (auto [m, n, k] : kManyTiles) {
    for (DType out : kOut) ok &= Check({1, m, n, k, out, false, false, false, true, true, 1});
    ok &= Check({1, m, n, k, DType::kBF16, false, false, true, true, false, 0});
    ok &= Check({1, m, n, k, DType::kF32, true, false, false, true, false, 0, true});
  }
  return ok ? 0 : 1;
}
