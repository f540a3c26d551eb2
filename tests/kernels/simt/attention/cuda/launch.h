// Launches that may overlap, by simt.h: here every kernel ends before the next one begins.
#pragma once
#include <cuda_runtime_api.h>

namespace stof::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int, cudaStream_t, Arguments... arguments) {
  simt::launch(grid, {unsigned(threads)}, [=] { kernel(arguments...); });
  return cudaSuccess;
}
inline void wait_for_predecessor() {}
inline void let_successor_start() {}

}  // namespace stof::cuda
