// What csrc's header of this name has, on the CPU: kernels follow each other, so do their clusters.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "hopper_ptx.cuh"
#include "hopper_cluster.cuh"

constexpr cudaError_t cudaErrorNotSupported = cudaError_t(801);
enum { cudaDevAttrMultiProcessorCount = 16 };
inline int device_units = 132;  // multiprocessors
inline int late_block = 2;      // of each cluster, that starts when the other one is far ahead
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = device_units, cudaSuccess; }

namespace stof::cuda {

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel, int bytes, std::atomic<uint64_t>&, int) {
  if (bytes > 227 * 1024) simt::die("more shared memory than a block has");
  return cudaSuccess;
}

template <unsigned kCluster = 1, typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int, cudaStream_t, Arguments&&... arguments) {
  if (grid.x % kCluster != 0) simt::die("a cluster is not whole");
  for (unsigned first = 0; first < grid.x; first += kCluster) {
    simt::Hopper& hopper = simt::hopper();
    hopper.barriers.clear();
    hopper.threads = std::vector<simt::Hopper::Thread>(threads * kCluster);
    simt::barriers() = {};
    std::fill(shared_memory, shared_memory + kSharedMemory, 0x7e);  // halves are NaN
    simt::launch({1}, {unsigned(threads), kCluster}, [&] {
      for (int turn = 0; turn < 150 && kCluster > 1 && int(threadIdx.y) == late_block; ++turn) {
        simt::Fiber* self = simt::state().now;
        swapcontext(&self->context, &simt::state().scheduler);
      }
      blockIdx.x = first + threadIdx.y, gridDim.x = grid.x;
      kernel(arguments...);
    });
  }
  return cudaSuccess;
}
inline void wait_for_predecessor() {}
inline void let_successor_start() {}

}  // namespace stof::cuda
