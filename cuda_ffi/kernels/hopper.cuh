// The instructions of sm_90a that the kernels use, one function each: mbarriers, bulk tensor
// copies, warpgroup matrix products. PTX ISA, sections 9.7.13 and 9.7.15.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jfp4 {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// The address of the same variable in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t MapToRank(uint32_t shared_address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mapped)
               : "r"(shared_address), "r"(rank));
  return mapped;
}

// --- mbarrier ---

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Arrives at the barrier that has the same place in the shared memory of block `rank`.
__device__ __forceinline__ void BarrierArriveRemote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(MapToRank(SharedAddress(barrier), rank))
      : "memory");
}

__device__ __forceinline__ uint32_t LoadShared(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(SharedAddress(p)) : "memory");
  return v;
}

// Writes a word at the same place in the shared memory of block `rank`, and counts its bytes on the
// barrier that has `barrier`'s place there.
__device__ __forceinline__ void StoreRemote(uint32_t* to, uint32_t value, uint64_t* barrier,
                                            uint32_t rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   MapToRank(SharedAddress(to), rank)),
               "r"(value), "r"(MapToRank(SharedAddress(barrier), rank))
               : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// --- bulk tensor copies ---

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads the box at (x, y, z) and counts its bytes on `barrier`.
__device__ __forceinline__ void TensorLoad(void* destination, const CUtensorMap* map,
                                           uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(SharedAddress(destination)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same to every block of the cluster whose bit is set in `mask`, at the same place in each.
__device__ __forceinline__ void TensorLoadMulticast(void* destination, const CUtensorMap* map,
                                                    uint64_t* barrier, uint16_t mask, int x, int y,
                                                    int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(SharedAddress(destination)),
      "l"(map), "r"(SharedAddress(barrier)), "h"(mask), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Stores a box that is not read soon: L2 gives up its lines before others.
__device__ __forceinline__ void TensorStore(const CUtensorMap* map, const void* source, int x,
                                            int y, int z) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group.L2::cache_hint "
      "[%0, {%2, %3, %4}], [%1], %5;" ::"l"(map),
      "r"(SharedAddress(source)), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void TensorStoreCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the sources of all but the `kPending` newest groups of stores have been read.
template <int kPending>
__device__ __forceinline__ void TensorStoreWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary writes to shared memory before later reads of the copy engine and
// of the tensor cores.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Stores a warp's four 8 x 8 matrices of 16-bit elements, laid out over the lanes as accumulators
// are: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void StoreMatrices(void* row, const uint32_t (&pairs)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(row)),
      "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
      : "memory");
}

// --- warpgroups ---

// A barrier among `threads` threads; 0 is __syncthreads' own.
__device__ __forceinline__ void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void RegistersIncrease() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void RegistersDecrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of an operand whose rows of 128 bytes along k lie one after the other in shared
// memory, 128-byte swizzled, from a 1024-byte boundary on. Advancing along k by 32 bytes adds 2.
__device__ __forceinline__ uint64_t WgmmaDescriptor(const void* p) {
  constexpr uint64_t kLeadingOffset = 1;            // not used by this layout
  constexpr uint64_t kStrideOffset = 8 * 128 >> 4;  // from one group of eight rows to the next
  constexpr uint64_t kSwizzle128 = 1;
  return (SharedAddress(p) & 0x3FFFF) >> 4 | kLeadingOffset << 16 | kStrideOffset << 32 |
         kSwizzle128 << 62;
}

// --- host side ---

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches clusters of so many blocks.
inline cudaLaunchAttribute ClusterOf(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// How many of a launch's clusters run at once on this device; there may be room for none. The
// driver takes a while to say so: what it said is kept.
cudaError_t ClustersAtOnce(const void* kernel, const cudaLaunchConfig_t& config, int* clusters);

// A map of a contiguous [batch, rows, cols] tensor for boxes of [1, box_rows, box_cols]. Elements
// past an edge read as zero and are not stored. `promotion` is how much L2 fetches at once. Returns
// an error if the driver refuses the geometry.
cudaError_t MakeTensorMap(CUtensorMap* map, CUtensorMapDataType type, int element_bytes,
                          const void* data, int64_t batch, int64_t rows, int64_t cols, int box_rows,
                          int box_cols, CUtensorMapSwizzle swizzle,
                          CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace jfp4
