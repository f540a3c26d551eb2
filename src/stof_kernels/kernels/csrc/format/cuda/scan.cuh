// Prefix sums over a block's threads, over a warp's lanes, and over the warps of a block that share out a long array.
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

// The same over the lanes of a warp, all of which must call it.
template <typename V>
__device__ __forceinline__ V warp_exclusive_scan(V value, V& total) {
  const int lane = threadIdx.x & 31;
  V sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const V below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  total = __shfl_sync(0xffffffffu, sum, 31);
  return sum - value;
}

// A warp's part of n entries: neighbours, in whole groups of 32, so that one pass per warp keeps their order.
struct Range {
  int begin, end;
};

__device__ __forceinline__ Range warp_range(int n) {
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5;
  const int groups = (n + 31) / 32, each = (groups + warps - 1) / warps * 32;
  return {min(warp * each, n), min((warp + 1) * each, n)};
}

// Sum of `mine` over the warps before this one, and over all: every thread calls it, `mine` is lane 0's. 32 warps at most.
template <typename V>
__device__ __forceinline__ V before_warp(V mine, V* shared, V& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  V all;
  const V before = warp_exclusive_scan<V>(lane < warps ? shared[lane] : V(0), all);
  __syncthreads();  // shared may be used again
  total = all;
  return __shfl_sync(0xffffffffu, before, warp);
}

// Sum over the lanes, for all of them.
template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
  V total;
  warp_exclusive_scan<V>(value, total);
  return total;
}

}  // namespace stof::cuda
