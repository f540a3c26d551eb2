// A whole product, plain or batched, by one template of the list.
#pragma once

#include "epilogue.cuh"
#include "mainloop.cuh"

namespace stof::bolt {

// Sums of warps along k onto those of the first one.
template <typename T>
__device__ __forceinline__ void join_slices(float (&sum)[T::kBlocksM][T::kBlocksN][4], float* shared) {
  constexpr int kEach = T::kBlocksM * T::kBlocksN * 4, kGroup = 32 * T::kWarpsM * T::kWarpsN;
  const int thread = int(threadIdx.x) % kGroup, slice = int(threadIdx.x) / kGroup;
  float* flat = &sum[0][0][0];
  if (slice > 0) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) shared[((slice - 1) * kEach + i) * kGroup + thread] = flat[i];
  }
  block_barrier();
  if (slice == 0) {
#pragma unroll
    for (int s = 0; s < T::kWarpsK - 1; ++s)
#pragma unroll
      for (int i = 0; i < kEach; ++i) flat[i] += shared[(s * kEach + i) * kGroup + thread];
  }
  block_barrier();
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads) gemm_kernel(const GemmProblem p, int log) {
  STOF_DYNAMIC_SHARED(shared);
  const int tile_m = int(blockIdx.x) >> log, tile_n = (int(blockIdx.y) << log) + (int(blockIdx.x) & ((1 << log) - 1));
  const int first_m = tile_m * T::kM, first_n = tile_n * T::kN, batch = int(blockIdx.z);
  if (first_n >= p.n) return;
  half_t* tile = reinterpret_cast<half_t*>(shared);
  float sum[T::kBlocksM][T::kBlocksN][4] = {};
  main_loop<T>(p.a + int64_t(batch) * p.m * p.k, p.b + int64_t(batch) * p.n * p.k, first_m, first_n, p.m, p.n, p.k, tile, sum);
  if constexpr (T::kWarpsK > 1) join_slices<T>(sum, reinterpret_cast<float*>(shared));
  const int warp = int(threadIdx.x) / 32;
  if (warp < T::kWarpsM * T::kWarpsN) {
    const int row = warp % T::kWarpsM * T::kWarpM, column = warp / T::kWarpsM * T::kWarpN;
    finish(sum, p.bias, p.epilogue, first_n + column, p.n);
    put(tile, T::kStoreStep, row, column, sum);
  }
  block_barrier();
  store<T::kM, T::kN, T::kThreads>(p.d + int64_t(batch) * p.m * p.n, tile, first_m, first_n, p.m, p.n);
}

}  // namespace stof::bolt
