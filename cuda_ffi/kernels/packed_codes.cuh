// Packed codes on their way into tensor cores: nibbles to E4M3, products of what is in registers,
// and the loads and stores around them.
#pragma once

#include <cstdint>

namespace jfp4 {

// --- shared memory, of this block and of its cluster ---

__device__ __forceinline__ uint4 LoadShared(uint32_t shared_address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address)
               : "memory");
  return v;
}

// A warp's four 8 x 16-byte matrices: lane i gives the address of row i % 8 of matrix i / 8, and
// gets word i % 4 of row i / 4 of each.
__device__ __forceinline__ void LoadMatrices(uint32_t shared_address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address)
               : "memory");
}

__device__ __forceinline__ void StoreShared(uint32_t shared_address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ int ClusterId() {
  int id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}

// Waits for the cluster's other threads to be here, and not for what they and this one have stored.
__device__ __forceinline__ void ClusterMeet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ float4 LoadCluster(uint32_t cluster_address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(cluster_address)
               : "memory");
  return v;
}

// --- products ---

// d[64, n] += a[64, 32] b[n, 32]^T in E4M3, a in registers. In a warp, a[h + 2 i] is row
// lane / 4 + 8 h and columns 16 i + 4 (lane % 4) + {0, 1, 2, 3}; d[4 j + 2 h + c] is row
// lane / 4 + 8 h and column 8 j + 2 (lane % 4) + c. PTX ISA, section 9.7.15.
__device__ __forceinline__ void Wgmma(float (&d)[4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void Wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Transposes an 8 x 8 matrix of 16-bit elements, two a lane: of what lane i gives, row i / 4 and
// columns 2 (i % 4) + {0, 1}, lane i gets those of the transpose.
__device__ __forceinline__ uint32_t Transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// --- nibbles to E4M3 ---

constexpr uint32_t kSign = 0x80808080, kMagnitude = 0x1C1C1C1C;

__device__ __forceinline__ uint32_t EvenCodes(uint32_t nibbles) {
  return (nibbles << 4 & kSign) | (nibbles << 2 & kMagnitude);
}

__device__ __forceinline__ uint32_t OddCodes(uint32_t nibbles) {
  return (nibbles & kSign) | (nibbles >> 2 & kMagnitude);
}

// Codes of two chunks; of each, words has that of a row and of the eighth one below it.
__device__ __forceinline__ void Unpack(const uint32_t (&words)[4], uint32_t (&codes)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    codes[i][0] = EvenCodes(words[2 * i]);
    codes[i][1] = EvenCodes(words[2 * i + 1]);
    codes[i][2] = OddCodes(words[2 * i]);
    codes[i][3] = OddCodes(words[2 * i + 1]);
  }
}

}  // namespace jfp4
