// RMSNorm and its gradient in one pass each: a row waits in the registers of a block for the sums
// over it. Both are bound by memory.
#include <cuda_bf16.h>

#include "cuda_ffi/kernels/quantize.cuh"
#include "cuda_ffi/kernels/rms_norm.h"

namespace jfp4 {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kHeld = 16;  // elements of a row that a thread has
static_assert(kMaxThreads * kHeld == kMaxNormColumns);

// How a thread takes its elements of a row: 16 bytes at a time, or one element where rows do not
// start at a multiple of that.
template <DType kType, bool kVectors>
struct Access {
  static constexpr int kWidth = kVectors ? kPerVector<kType> : 1;
  static constexpr int kCount = kHeld / kWidth;
  using Raw = std::conditional_t<kVectors, uint4,
                                 std::conditional_t<kType == DType::kF32, uint32_t, uint16_t>>;

  static __device__ __forceinline__ Raw Load(const void* from, int64_t index) {
    return __ldcs(static_cast<const Raw*>(from) + index);
  }

  static __device__ __forceinline__ void Unpack(const Raw& raw, float (&x)[kWidth]) {
    if constexpr (kVectors) {
      jfp4::Unpack<kType>(raw, x);
    } else {
      x[0] = Word<kType>::Get(raw, 0);
    }
  }

  // Rounded to the type.
  static __device__ __forceinline__ Raw Pack(const float (&x)[kWidth]) {
    if constexpr (kVectors) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == DType::kF32) {
          words[i] = __float_as_uint(x[i]);
        } else {
          words[i] = Bits(x[2 * i]) | uint32_t{Bits(x[2 * i + 1])} << 16;
        }
      }
      return {words[0], words[1], words[2], words[3]};
    } else if constexpr (kType == DType::kF32) {
      return __float_as_uint(x[0]);
    } else {
      return Bits(x[0]);
    }
  }

  static __device__ __forceinline__ void Store(void* to, int64_t index, const Raw& raw) {
    static_cast<Raw*>(to)[index] = raw;
  }

  // The scales of the elements there.
  static __device__ __forceinline__ void LoadScales(const float* from, int64_t index,
                                                    float (&scales)[kWidth]) {
    if constexpr (kVectors) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(from + index * kWidth + i));
        scales[i] = four.x;
        scales[i + 1] = four.y;
        scales[i + 2] = four.z;
        scales[i + 3] = four.w;
      }
    } else {
      scales[0] = __ldg(from + index);
    }
  }

 private:
  static __device__ __forceinline__ uint16_t Bits(float x) {
    return kType == DType::kBF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                 : __half_as_ushort(__float2half_rn(x));
  }
};

// The sums of a and b over a block, in the same order whatever else the device does. `shared` is
// not to be written again before all threads are past this.
__device__ __forceinline__ float2 BlockSum(float a, float b, float2 (&shared)[kMaxWarps]) {
  const auto over_warp = [](float& v) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      v += __shfl_xor_sync(~0u, v, distance);
    }
  };
  over_warp(a);
  over_warp(b);
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) shared[threadIdx.x / kWarp] = {a, b};
  __syncthreads();
  const float2 own = lane < blockDim.x / kWarp ? shared[lane] : float2{};
  a = own.x;
  b = own.y;
  over_warp(a);
  over_warp(b);
  return {a, b};
}

// A block a row.
template <DType kType, bool kVectors>
__global__ void __launch_bounds__(kMaxThreads) RmsNormKernel(const __grid_constant__ RmsNorm args) {
  using Row = Access<kType, kVectors>;
  constexpr int kWidth = Row::kWidth, kCount = Row::kCount;
  __shared__ float2 sums[kMaxWarps];
  const int64_t row = blockIdx.x;
  const int pieces = static_cast<int>(args.cols / kWidth);
  const auto at = [&](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x); };

  typename Row::Raw x_raw[kCount] = {}, added_raw[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at(i) >= pieces) break;
    x_raw[i] = Row::Load(args.x, row * pieces + at(i));
    if (args.added != nullptr) added_raw[i] = Row::Load(args.added, row * pieces + at(i));
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at(i) >= pieces) break;
    float x[kWidth];
    Row::Unpack(x_raw[i], x);
    if (args.added != nullptr) {
      float added[kWidth];
      Row::Unpack(added_raw[i], added);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] += added[j];
      x_raw[i] = Row::Pack(x);
      Row::Unpack(x_raw[i], x);
      Row::Store(args.sum, row * pieces + at(i), x_raw[i]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += x[j] * x[j];
  }
  squares = BlockSum(squares, 0, sums).x;
  const float inverse = __frsqrt_rn(squares / args.cols + args.epsilon);
  const float* const scale = args.scale + row / args.rows * args.cols;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at(i) >= pieces) break;
    float x[kWidth], scales[kWidth];
    Row::Unpack(x_raw[i], x);
    Row::LoadScales(scale, at(i), scales);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] *= inverse * scales[j];
    Row::Store(args.y, row * pieces + at(i), Row::Pack(x));
  }
}

// A block has a part of the rows, one after the other, and adds up the scale's gradient over them.
template <DType kType, bool kVectors>
__global__ void __launch_bounds__(kMaxThreads, 2)
    RmsNormGradientKernel(const __grid_constant__ RmsNormGradient args) {
  using Row = Access<kType, kVectors>;
  constexpr int kWidth = Row::kWidth, kCount = Row::kCount;
  __shared__ float2 sums[2][kMaxWarps];
  const int64_t batch = blockIdx.x / args.parts, part = blockIdx.x % args.parts;
  const int64_t first = part * args.rows_of_part;
  const int64_t last = min(first + args.rows_of_part, args.rows);
  const int pieces = static_cast<int>(args.cols / kWidth);
  const auto at = [&](int i) { return static_cast<int>(threadIdx.x + i * blockDim.x); };
  const float* const scale = args.scale + batch * args.cols;

  float dscale[kCount][kWidth] = {};
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = (batch * args.rows + row) * pieces;
    typename Row::Raw x_raw[kCount] = {}, dy_raw[kCount] = {}, dsum_raw[kCount] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (at(i) >= pieces) break;
      x_raw[i] = Row::Load(args.x, start + at(i));
      dy_raw[i] = Row::Load(args.dy, start + at(i));
      if (args.dsum != nullptr) dsum_raw[i] = Row::Load(args.dsum, start + at(i));
    }
    float squares = 0, along = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (at(i) >= pieces) break;
      float x[kWidth], dy[kWidth], scales[kWidth];
      Row::Unpack(x_raw[i], x);
      Row::Unpack(dy_raw[i], dy);
      Row::LoadScales(scale, at(i), scales);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        squares += x[j] * x[j];
        along += dy[j] * scales[j] * x[j];
      }
    }
    // Two in turn: a warp may be at the next row's sums while another still reads these.
    const float2 all = BlockSum(squares, along, sums[row % 2]);
    const float square = all.x / args.cols + args.epsilon;
    const float inverse = __frsqrt_rn(square), mean = all.y / args.cols / square;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (at(i) >= pieces) break;
      float x[kWidth], dy[kWidth], dx[kWidth], scales[kWidth];
      Row::Unpack(x_raw[i], x);
      Row::Unpack(dy_raw[i], dy);
      Row::Unpack(dsum_raw[i], dx);
      Row::LoadScales(scale, at(i), scales);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        dx[j] += inverse * (dy[j] * scales[j] - x[j] * mean);
        dscale[i][j] += dy[j] * (x[j] * inverse);
      }
      Row::Store(args.dx, start + at(i), Row::Pack(dx));
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at(i) >= pieces) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      args.dscale[blockIdx.x * args.cols + at(i) * kWidth + j] = dscale[i][j];
    }
  }
}

// Calls f with the type and whether all of `tensors` are of whole vectors.
template <typename F, typename... Tensors>
cudaError_t WithAccess(DType type, int64_t cols, F&& f, Tensors... tensors) {
  const bool vectors =
      cols * ElementBytes(type) % kVectorBytes == 0 && (IsAligned(tensors, kVectorBytes) && ...);
  return WithType(
      type, [&](auto t) { return vectors ? f(t, std::true_type()) : f(t, std::false_type()); });
}

int Threads(int64_t cols) { return static_cast<int>(RoundUp(CeilDiv(cols, kHeld), kWarp)); }

}  // namespace

cudaError_t LaunchRmsNorm(const RmsNorm& args, cudaStream_t stream) {
  const auto launch = [&](auto type, auto vectors) {
    return Launch(RmsNormKernel<type(), vectors()>, args.batch * args.rows, Threads(args.cols),
                  stream, args);
  };
  return WithAccess(args.type, args.cols, launch, args.x, args.added, args.scale, args.sum, args.y);
}

cudaError_t LaunchRmsNormGradient(const RmsNormGradient& args, cudaStream_t stream) {
  const auto launch = [&](auto type, auto vectors) {
    return Launch(RmsNormGradientKernel<type(), vectors()>, args.batch * args.parts,
                  Threads(args.cols), stream, args);
  };
  return WithAccess(args.type, args.cols, launch, args.x, args.dy, args.dsum, args.scale, args.dx);
}

}  // namespace jfp4
