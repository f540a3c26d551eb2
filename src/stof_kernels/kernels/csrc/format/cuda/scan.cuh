// A block-wide exclusive scan of small tuples.
#pragma once

#include <cstdint>

namespace stof::cuda {

// Exclusive prefix of `value` over the block's threads and the block's total; every thread must call it. `shared` holds
// one entry per warp and one more.
template <typename V>
__device__ __forceinline__ V block_exclusive_scan(V value, V* shared, V& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  V sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const V below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    V mine = lane < warps ? shared[lane] : V(0);
    V inclusive = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const V below = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    if (lane < warps) shared[lane] = inclusive - mine;
    if (lane == 31) shared[warps] = inclusive;
  }
  __syncthreads();
  const V result = shared[warp] + sum - value;
  total = shared[warps];
  __syncthreads();  // shared may be used again
  return result;
}

}  // namespace stof::cuda
