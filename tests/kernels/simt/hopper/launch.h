// What csrc's header of this name has, on the CPU: kernels follow each other.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

constexpr cudaError_t cudaErrorNotSupported{};
enum { cudaDevAttrMultiProcessorCount };
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int*, int, int);

namespace stof::cuda {

template <typename Kernel>
cudaError_t allow_shared_memory(Kernel, int, std::atomic<uint64_t>&, int);
template <typename... Everything>
cudaError_t launch_overlapping(Everything&&...);
inline void wait_for_predecessor() {}
inline void let_successor_start() {}

}  // namespace stof::cuda
