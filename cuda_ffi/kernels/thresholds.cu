// Radix selection in one cluster: a digit of the keys at a time, from the top. Each block counts
// its keys' digits in its own shared memory; every block then adds up the histograms of all of them
// and so knows, without hearing from the others, in which bin each rank lies and which rank is left
// there.
#include <cuda_runtime.h>

#include <limits>

#include "cuda_ffi/kernels/element.cuh"
#include "cuda_ffi/kernels/hopper.cuh"
#include "cuda_ffi/kernels/thresholds.h"

namespace jfp4 {
namespace {

constexpr int kBlocks = 8;  // of a cluster
constexpr int kThreads = 1024;
constexpr int kStep = kBlocks * kThreads;
constexpr int kKeysHeld = 8;  // of a thread: 65536 in a cluster, all loads in flight at once
constexpr int kChunk = kStep * kKeysHeld;
constexpr int kRanks = 2;

constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kMaxDigits = 32 / kDigitBits;
constexpr int kBinsPerLane = kBins / kWarp;
static_assert(kThreads == 2 * kRanks * kBins, "two threads add up each bin");

struct Shared {
  uint32_t bins[kMaxDigits][kRanks][kBins];  // a digit each: other blocks may be one behind
  uint32_t sums[kRanks][kBins];
  uint32_t prefix[kRanks];  // the digits found so far
  uint32_t left[kRanks];    // the rank among the keys that start with them
  uint32_t has_nan;
};

// The bits of an element, in the upper half of the word if there are 16.
template <DType kType>
__device__ __forceinline__ uint32_t LoadBits(const void* x, int64_t index) {
  if constexpr (kType == DType::kF32) return __ldg(static_cast<const uint32_t*>(x) + index);
  return static_cast<uint32_t>(__ldg(static_cast<const uint16_t*>(x) + index)) << 16;
}

template <DType kType>
constexpr uint32_t kInfinityKey = kType == DType::kF16 ? 0x7C000000 : kInfinityBits;

// Unsigned integers that sort as the elements do, -0 before +0.
__device__ __forceinline__ uint32_t KeyOf(uint32_t bits) {
  return bits & kSignBit ? ~bits : bits | kSignBit;
}

__device__ __forceinline__ uint32_t BitsOf(uint32_t key) {
  return key & kSignBit ? key ^ kSignBit : ~key;
}

// The same variable of another block of the cluster.
__device__ __forceinline__ uint32_t LoadRemote(const uint32_t* variable, uint32_t rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(value)
               : "r"(MapToRank(SharedAddress(variable), rank))
               : "memory");
  return value;
}

// A warp finds the bin that rank `left` falls in, adds it to the prefix and makes the rank one
// within the bin.
__device__ __forceinline__ void FindBin(const uint32_t (&sums)[kBins], uint32_t& prefix,
                                        uint32_t& left) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t rank = left;
  uint32_t through = 0;  // keys in this lane's bins, then also in those of the lanes before
#pragma unroll
  for (int i = 0; i < kBinsPerLane; ++i) through += sums[lane * kBinsPerLane + i];
  const uint32_t own = through;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += before;
  }
  uint32_t below = through - own;
  __syncwarp();  // all have read the rank
  if (rank < below || rank >= through) return;
  int bin = lane * kBinsPerLane;
  while (rank - below >= sums[bin]) below += sums[bin++];
  prefix = prefix << kDigitBits | bin;
  left = rank - below;
}

// A cluster a tensor.
template <DType kType>
__global__ void __cluster_dims__(kBlocks) __launch_bounds__(kThreads)
    ThresholdsKernel(const __grid_constant__ Thresholds args) {
  constexpr int kDigits = ElementBytes(kType);
  __shared__ Shared shared;
  const int64_t batch = blockIdx.x / kBlocks;
  const int rank = ClusterRank();
  const int thread = rank * kThreads + threadIdx.x;  // of the cluster
  const int warp = threadIdx.x / kWarp;
  const int64_t base = batch * args.size;

  uint32_t bits[kKeysHeld];
  int held = 0;
  const auto load = [&](int64_t first) {
    const int64_t remaining = args.count - first - thread;  // of this thread, one in kStep
    held =
        static_cast<int>(min(max((remaining + kStep - 1) / kStep, int64_t{0}), int64_t{kKeysHeld}));
#pragma unroll
    for (int i = 0; i < kKeysHeld; ++i) {
      const int64_t index = first + i * kStep + thread;
      bits[i] = i < held ? LoadBits<kType>(args.x, base + index * args.stride) : 0;
    }
  };
  load(0);

  uint32_t* bins = &shared.bins[0][0][0];
  for (int i = threadIdx.x; i < kDigits * kRanks * kBins; i += kThreads) bins[i] = 0;
  if (threadIdx.x == 0) {
    shared.has_nan = 0;
    shared.prefix[0] = shared.prefix[1] = 0;
    shared.left[0] = args.low_rank;
    shared.left[1] = args.high_rank;
  }
  __syncthreads();

  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 32 - kDigitBits * (digit + 1);
    const uint32_t prefixes[kRanks] = {shared.prefix[0], shared.prefix[1]};
    for (int64_t first = 0; first < args.count; first += kChunk) {
      if (args.count > kChunk && first + digit > 0) load(first);
#pragma unroll
      for (int i = 0; i < kKeysHeld; ++i) {
        if (i >= held) break;
        const uint32_t key = KeyOf(bits[i]), bin = key >> shift & (kBins - 1);
        if (digit == 0) {  // both ranks look at the same counts
          if ((bits[i] & ~kSignBit) > kInfinityKey<kType>) atomicOr(&shared.has_nan, 1);
          atomicAdd(&shared.bins[0][0][bin], 1);
          continue;
        }
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
          if (key >> shift >> kDigitBits == prefixes[j]) atomicAdd(&shared.bins[digit][j][bin], 1);
        }
      }
    }
    ClusterSync();

    const int which = threadIdx.x / 2 / kBins, bin = threadIdx.x / 2 % kBins;
    const uint32_t* count = &shared.bins[digit][digit == 0 ? 0 : which][bin];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; i += 2) sum += LoadRemote(count, i + threadIdx.x % 2);
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (threadIdx.x % 2 == 0) shared.sums[which][bin] = sum;
    __syncthreads();
    if (warp < kRanks) FindBin(shared.sums[warp], shared.prefix[warp], shared.left[warp]);
    __syncthreads();
  }

  if (rank == 0 && threadIdx.x < kRanks) {
    uint32_t has_nan = 0;
    for (int i = 0; i < kBlocks; ++i) has_nan |= LoadRemote(&shared.has_nan, i);
    const uint32_t bits = BitsOf(shared.prefix[threadIdx.x] << (32 - kDigitBits * kDigits));
    const float value = Word<kType>::Get(bits, Word<kType>::kElements - 1);
    (threadIdx.x == 0 ? args.lo : args.hi)[batch] = has_nan ? __uint_as_float(kNaNBits) : value;
  }
  ClusterSync();  // no block's shared memory goes while another may read it
}

}  // namespace

cudaError_t LaunchThresholds(const Thresholds& args, cudaStream_t stream) {
  if (args.batch == 0 || args.count == 0) return cudaSuccess;
  if (args.batch > std::numeric_limits<int32_t>::max() / kBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.batch * kBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  switch (args.type) {
    case DType::kBF16:
      return cudaLaunchKernelEx(&config, ThresholdsKernel<DType::kBF16>, args);
    case DType::kF16:
      return cudaLaunchKernelEx(&config, ThresholdsKernel<DType::kF16>, args);
    case DType::kF32:
      return cudaLaunchKernelEx(&config, ThresholdsKernel<DType::kF32>, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jfp4
