#include <map>
#include <mutex>
#include <tuple>

#include "cuda_ffi/kernels/hopper.cuh"

namespace jfp4 {

cudaError_t ClustersAtOnce(const void* kernel, const cudaLaunchConfig_t& config, int* clusters) {
  int device;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned, size_t, unsigned>, int> known;
  const std::tuple key(device, kernel, config.blockDim.x, config.dynamicSmemBytes,
                       config.attrs->val.clusterDim.x);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  const cudaError_t status = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  if (status == cudaSuccess) known.emplace(key, *clusters);
  return status;
}

cudaError_t MakeTensorMap(CUtensorMap* map, CUtensorMapDataType type, int element_bytes,
                          const void* data, int64_t batch, int64_t rows, int64_t cols, int box_rows,
                          int box_cols, CUtensorMapSwizzle swizzle,
                          CUtensorMapL2promotion promotion) {
  // The driver's function is looked up at run time, so that the library also loads without a
  // driver.
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                          12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {cuuint64_t(cols), cuuint64_t(rows), cuuint64_t(batch)};
  const cuuint64_t strides[2] = {cuuint64_t(cols) * element_bytes,
                                 cuuint64_t(rows) * cols * element_bytes};
  const cuuint32_t box[3] = {cuuint32_t(box_cols), cuuint32_t(box_rows), 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, type, 3, const_cast<void*>(data), sizes, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jfp4
