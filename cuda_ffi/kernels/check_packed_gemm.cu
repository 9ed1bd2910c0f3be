// Checks the product of packed operands without Python or XLA: every element of y against sums in
// double, bit for bit. Small enough for compute-sanitizer. Exit status 1 on a mismatch. With the
// argument `bench`, measures how fast b is read, from memory rather than from L2; with `large`,
// also checks the shapes that are measured.
//
//   cmake -S . -B build && cmake --build build --target check_packed_gemm
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda_ffi/kernels/packed_gemm.h"

namespace {

using namespace jfp4;

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

// --- correctness ---

struct Case {
  int batch, m, n, k;
  DType out;
  bool row_scales, bias;
};

// The nibbles of a Gaussian rounded to E2M1, two a byte; `values` gets twice the numbers. Repeats
// itself after as many as take no time to draw, which is no multiple of a row.
std::vector<uint8_t> Codes(size_t size, std::mt19937& random, std::vector<int8_t>* values) {
  static constexpr int kDoubled[] = {0, 1, 2, 3, 4, 6, 8, 12};
  std::normal_distribution<float> normal(0, 1.7);
  std::vector<uint8_t> bytes(size / 2);
  values->resize(size);
  constexpr size_t kPeriod = 2 * 499979;
  for (size_t i = 0; i < size; ++i) {
    if (i >= kPeriod) {
      (*values)[i] = (*values)[i - kPeriod];
      bytes[i / 2] = bytes[(i - kPeriod) / 2];
      continue;
    }
    const float x = normal(random);
    int nearest = 0;
    for (int code = 1; code < 8; ++code) {
      if (std::fabs(std::fabs(x) - kDoubled[code] * 0.5f) <
          std::fabs(std::fabs(x) - kDoubled[nearest] * 0.5f)) {
        nearest = code;
      }
    }
    // Minus zero is a code too.
    (*values)[i] = x < 0 ? -kDoubled[nearest] : kDoubled[nearest];
    bytes[i / 2] |= (nearest | (x < 0 ? 8 : 0)) << i % 2 * 4;
  }
  return bytes;
}

std::vector<float> Scales(size_t size, std::mt19937& random) {
  std::vector<float> values(size);
  for (float& v : values) v = std::exp(std::normal_distribution<float>()(random));
  return values;
}

uint32_t Rounded(float v, DType type) {
  uint32_t bits = 0;
  if (type == DType::kF32) {
    std::memcpy(&bits, &v, 4);
  } else if (type == DType::kBF16) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(v);
    std::memcpy(&bits, &rounded, 2);
  } else {
    const __half rounded = __float2half_rn(v);
    std::memcpy(&bits, &rounded, 2);
  }
  return bits;
}

bool Check(const Case& c) {
  std::mt19937 random(c.m + 7 * c.n + 31 * c.k);
  std::vector<int8_t> a, b;
  const size_t bm = size_t(c.batch) * c.m, bn = size_t(c.batch) * c.n;
  const auto a_codes = Codes(bm * c.k, random, &a);
  const auto b_codes = Codes(bn * c.k, random, &b);
  const auto a_scale = Scales(c.row_scales ? bm : c.batch, random);
  const auto b_scale = Scales(c.row_scales ? bn : c.batch, random);
  const auto bias = Scales(bn, random);
  const int width = c.out == DType::kF32 ? 4 : 2;
  // What follows y must stay as it is.
  constexpr int kGuard = 64;
  std::vector<uint8_t> y(bm * c.n * width + kGuard);
  PackedGemm g{c.batch,
               c.m,
               c.n,
               c.k,
               ToDevice(a_codes),
               ToDevice(b_codes),
               ToDevice(a_scale),
               c.row_scales ? c.m : 1,
               ToDevice(b_scale),
               c.row_scales ? c.n : 1,
               c.bias ? ToDevice(bias) : nullptr,
               ToDevice(y),
               c.out};
  Require(cudaMemset(g.y, 0xA5, y.size()), "poison");
  Require(LaunchPackedGemm(g, nullptr), "LaunchPackedGemm");
  Require(cudaDeviceSynchronize(), "PackedGemmKernel");
  Require(cudaMemcpy(y.data(), g.y, y.size(), cudaMemcpyDefault), "copy");

  size_t wrong = 0;
  for (int batch = 0; batch < c.batch; ++batch) {
    for (int i = 0; i < c.m; ++i) {
      for (int j = 0; j < c.n; ++j) {
        const size_t row = size_t(batch) * c.m + i, col = size_t(batch) * c.n + j;
        int quadrupled = 0;  // exact, as in double
        for (int k = 0; k < c.k; ++k) quadrupled += a[row * c.k + k] * b[col * c.k + k];
        float want = float(quadrupled * 0.25) * a_scale[c.row_scales ? row : batch];
        want *= b_scale[c.row_scales ? col : batch];
        if (c.bias) want += bias[col];
        const uint32_t want_bits = Rounded(want, c.out);
        uint32_t got_bits = 0;
        std::memcpy(&got_bits, &y[(row * c.n + j) * width], width);
        if (want_bits != got_bits && wrong++ < 3) {
          std::printf("  [%d, %d, %d]: got %08x, want %08x\n", batch, i, j, got_bits, want_bits);
        }
      }
    }
  }
  for (int i = 0; i < kGuard; ++i) wrong += y[y.size() - 1 - i] != 0xA5;
  std::printf("%s packed_gemm batch=%d m=%d n=%d k=%d out=%d row_scales=%d bias=%d: %zu\n",
              wrong ? "MISMATCH" : "ok", c.batch, c.m, c.n, c.k, int(c.out), c.row_scales, c.bias,
              wrong);
  for (const void* p : {(const void*)g.a, (const void*)g.b, (const void*)g.a_scale,
                        (const void*)g.b_scale, (const void*)g.bias, (const void*)g.y}) {
    cudaFree(const_cast<void*>(p));
  }
  return wrong == 0;
}

bool CheckAll(bool large) {
  const DType kOut[] = {DType::kBF16, DType::kF16, DType::kF32};
  // Every count of tokens a wgmma takes, edges on every side, k of less than a stage and of many,
  // one block a tile and clusters of several, every number of warpgroups that finish a tile, and of
  // steps whose codes of a there is room for.
  const int kShapes[][3] = {{1, 1, 32},      {1, 64, 64},     {3, 63, 96},     {8, 100, 1024},
                            {9, 64, 256},    {16, 300, 544},  {17, 100, 1024}, {32, 129, 2048},
                            {33, 100, 96},   {64, 63, 5120},  {65, 1, 1024},   {200, 100, 288},
                            {1, 5120, 1024}, {17, 1000, 800}, {64, 1300, 512}, {3, 100, 13824},
                            {64, 130, 5120}, {65, 260, 1056}, {2, 4, 0},       {5, 130, 4096},
                            {16, 20, 1056},  {13, 60, 2080},  {29, 20, 96},    {30, 17000, 32},
                            {13, 17000, 32}, {61, 17000, 32}, {40, 6600, 5184}};
  bool ok = true;
  int i = 0;
  for (auto [m, n, k] : kShapes) {
    ok &= Check({1, m, n, k, kOut[i % 3], i % 2 == 0, i % 3 != 0});
    ok &= Check({2, m, n, k, kOut[(i + 1) % 3], i % 2 == 1, i % 2 == 0});
    ++i;
  }
  // Nothing to do is no error.
  ok &= Check({1, 0, 8, 32, DType::kF32, true, false}) &
        Check({1, 8, 0, 32, DType::kF32, true, true});
  if (!large) return ok;
  for (int m : {1, 16, 17, 64, 200}) {
    for (auto [n, k] : {std::pair{5120, 5120}, {13824, 5120}, {5120, 13824}, {4096, 11008}}) {
      ok &= Check({1, m, n, k, kOut[i % 3], i % 2 == 0, i % 3 != 0});
      ++i;
    }
  }
  return ok;
}

// --- speed ---

constexpr int kLaunches = 50;
constexpr int kGraphLaunches = 20;
constexpr size_t kRotatedBytes = size_t{512} << 20;  // many times what L2 keeps

float Median(std::vector<float> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void Bench(int m, int n, int k) {
  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaEvent_t start, stop;
  Require(cudaEventCreate(&start), "cudaEventCreate");
  Require(cudaEventCreate(&stop), "cudaEventCreate");

  std::mt19937 random(1);
  std::vector<int8_t> values;
  const size_t b_bytes = size_t(n) * k / 2;
  const int buffers = static_cast<int>(kRotatedBytes / b_bytes) + 1;
  // Power, and so the clock, depends on the bits: all are real codes. One set of b's repeats.
  const auto some = Codes(1 << 20, random, &values);
  uint8_t* b;
  Require(cudaMalloc(&b, buffers * b_bytes), "cudaMalloc");
  for (size_t at = 0; at < buffers * b_bytes; at += some.size()) {
    Require(cudaMemcpy(b + at, some.data(), std::min(some.size(), buffers * b_bytes - at),
                       cudaMemcpyDefault),
            "copy");
  }
  uint8_t* a = ToDevice(Codes(size_t(m) * k, random, &values));
  float* a_scale = ToDevice(Scales(m, random));
  float* b_scale = ToDevice(Scales(n, random));
  uint16_t* y = ToDevice(std::vector<uint16_t>(size_t(m) * n));
  int next = 0;
  auto launch = [&] {
    const PackedGemm g{1,           m, n,       k, a,       b + next++ % buffers * b_bytes,
                       a_scale,     m, b_scale, n, nullptr, y,
                       DType::kBF16};
    Require(LaunchPackedGemm(g, stream), "LaunchPackedGemm");
  };
  auto time = [&](auto&& work) {
    Require(cudaEventRecord(start, stream), "cudaEventRecord");
    work();
    Require(cudaEventRecord(stop, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms;
    Require(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    return ms * 1000;
  };

  for (int i = 0; i < buffers; ++i) launch();
  std::vector<float> alone, in_graph;
  for (int i = 0; i < kLaunches; ++i) alone.push_back(time(launch));

  // As many graphs as it takes to go through all buffers, one after the other.
  std::vector<cudaGraphExec_t> graphs((buffers + kGraphLaunches - 1) / kGraphLaunches);
  next = 0;
  for (cudaGraphExec_t& graph : graphs) {
    cudaGraph_t captured;
    Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kGraphLaunches; ++i) launch();
    Require(cudaStreamEndCapture(stream, &captured), "capture");
    Require(cudaGraphInstantiate(&graph, captured, 0), "cudaGraphInstantiate");
    Require(cudaGraphDestroy(captured), "cudaGraphDestroy");
    Require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
  }
  for (int i = 0; i < kLaunches; ++i) {
    const cudaGraphExec_t graph = graphs[i % graphs.size()];
    in_graph.push_back(time([&] { Require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch"); }) /
                       kGraphLaunches);
  }
  const float one = Median(alone), each = Median(in_graph);
  std::printf("%5d %6d %6d %10.2f %10.2f %8.2f\n", m, n, k, one, each, b_bytes / each * 1e-6);

  for (cudaGraphExec_t graph : graphs) cudaGraphExecDestroy(graph);
  for (void* p : {(void*)a, (void*)b, (void*)a_scale, (void*)b_scale, (void*)y}) cudaFree(p);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  cudaStreamDestroy(stream);
}

void BenchAll() {
  std::printf("    m      n      k   alone us   graph us   b TB/s  (TB/s in a graph)\n");
  for (int m : {1, 16, 64, 256}) {
    for (auto [k, n] : {std::pair{5120, 5120},
                        {5120, 13824},
                        {13824, 5120},
                        {4096, 4096},
                        {4096, 11008},
                        {11008, 4096}}) {
      Bench(m, n, k);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "bench") {
    BenchAll();
    return 0;
  }
  return CheckAll(mode == "large") ? 0 : 1;
}
