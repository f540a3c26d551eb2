// How a product is launched; included by the source files that compile templates.
#pragma once

#include "gemm.cuh"
#include "launch.h"

namespace stof::bolt {

template <typename Problem, typename... More>
cudaError_t launch(void (*kernel)(Problem, More...), dim3 grid, int threads, int bytes, cudaStream_t stream, const Problem& p, More... more) {
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // a template that is too large for the card must not fail the next call
      return error;
    }
  }
  kernel<<<grid, threads, bytes, stream>>>(p, more...);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_gemm(const GemmProblem& p, cudaStream_t stream) {
  const Grid grid = grid_of(p.m, p.n, p.batch, T::kM, T::kN);
  return launch(&gemm_kernel<T>, dim3(grid.x, grid.y, grid.z), T::kThreads, T::kSharedBytes, stream, p, grid.log);
}

}  // namespace stof::bolt

#define STOF_BOLT_COMPILE(...) template cudaError_t launch_gemm<Tile<__VA_ARGS__>>(const GemmProblem&, cudaStream_t);
