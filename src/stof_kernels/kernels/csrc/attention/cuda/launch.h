// Launches that may begin while the kernel before them ends (Hopper's programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace stof::cuda {

// Raises a kernel's limit of dynamic shared memory, once per device. `prepared`: one bit a device, static to the caller.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes, std::atomic<uint64_t>& prepared, int device) {
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (prepared.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// For kernels that call wait_for_predecessor() before they touch memory that an earlier kernel writes, or write what it reads.
// Where the library is not for Hopper it is an ordinary launch. `kCluster` blocks in a row are a cluster.
template <unsigned kCluster = 1, typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                               Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
#ifdef STOF_HOPPER_TARGET
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kCluster, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes, config.numAttrs = kCluster > 1 ? 2 : 1;
#endif
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

#ifdef __CUDACC__
// Returns when everything before this kernel in its stream has ended and can be read.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel may take the multiprocessors that this one leaves free; it still waits for this one's results.
__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}
#endif

}  // namespace stof::cuda
