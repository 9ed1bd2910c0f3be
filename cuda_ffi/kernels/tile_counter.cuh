// A counter in scratch memory that nobody has cleared: who comes first starts it, and who takes the
// last number clears it for the next kernel. To have it zeroed ahead is a kernel of its own in
// front of every one that counts, which beside a collective takes longer than it takes to count.
#pragma once

#include <cstdint>

#include "cuda_ffi/kernels/types.h"

namespace jfp4 {

// `state` is one of these two once the counter is begun. Anything else is what memory held before:
// that it is one of them by chance is as likely as any number of 64 bits.
struct TileCounter {
  static constexpr unsigned long long kStarting = 0x9E3779B97F4A7C15;
  static constexpr unsigned long long kStarted = 0xC2B2AE3D27D4EB4F;

  unsigned long long state;
  uint32_t next;
  uint32_t unused;
};
static_assert(sizeof(TileCounter) == kCounterWords * sizeof(uint32_t));

__device__ __forceinline__ void SetState(TileCounter* counter, unsigned long long state) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(&counter->state), "l"(state) : "memory");
}

// Whether the caller is the first of all, who then starts the counter. The others return when it is
// started, and see what was written before that.
__device__ __forceinline__ bool ComesFirst(TileCounter* counter) {
  const auto load = [&] {
    unsigned long long state;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
                 : "=l"(state)
                 : "l"(&counter->state)
                 : "memory");
    return state;
  };
  unsigned long long state = load();
  while (state != TileCounter::kStarted) {
    if (state != TileCounter::kStarting &&
        atomicCAS(&counter->state, state, TileCounter::kStarting) == state) {
      return true;
    }
    state = load();  // not what was found: that would order nothing after who started it
  }
  return false;
}

// The first has number 0; `last`, which is at least 1, is the number that clears the counter.
__device__ __forceinline__ void Start(TileCounter* counter) {
  counter->next = 1;
  SetState(counter, TileCounter::kStarted);
}

// Takes the next number, from 1 to `last`, of a counter that is started. Who has taken one may add
// to `next` alone, and must clear `state` if that gives the last, which somebody has to take.
__device__ __forceinline__ uint32_t TakeNext(TileCounter* counter, uint32_t last) {
  const uint32_t number = atomicAdd(&counter->next, 1);
  if (number == last) SetState(counter, 0);
  return number;
}

// Takes the next number, from 0 on.
__device__ __forceinline__ uint32_t TakeNumber(TileCounter* counter, uint32_t last) {
  if (!ComesFirst(counter)) return TakeNext(counter, last);
  Start(counter);
  return 0;
}

}  // namespace jfp4
