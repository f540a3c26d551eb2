// From sums to the result: bias and activation in fp32, one rounding, rows through shared memory into 16-byte stores.
#pragma once

#include "device.cuh"

namespace stof::bolt {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erf_of(0.70710678f * x)); }

// Adds the bias of a warp's columns [first, + 8 * kBlocksN) and applies the activation; columns at or past n are left alone.
template <int kBlocksM, int kBlocksN>
__device__ __forceinline__ void finish(float (&sum)[kBlocksM][kBlocksN][4], const half_t* bias, int epilogue, int first, int n) {
  if (epilogue == kLinear) return;
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kBlocksN; ++j) {
    const int column = first + 8 * j + lane % 4 * 2;
    const float2 add = column < n ? unpack(*reinterpret_cast<const uint32_t*>(bias + column)) : make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i) {
      sum[i][j][0] += add.x, sum[i][j][1] += add.y, sum[i][j][2] += add.x, sum[i][j][3] += add.y;
    }
  }
  if (epilogue == kBiasRelu) {
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = sum[i][j][e] > 0.f ? sum[i][j][e] : 0.f;
  } else if (epilogue == kBiasGelu) {
#pragma unroll
    for (int i = 0; i < kBlocksM; ++i)
#pragma unroll
      for (int j = 0; j < kBlocksN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = gelu(sum[i][j][e]);
  }
}

// A warp's sums as halves into rows of `step` halves, from `row`, `column` on.
template <int kBlocksM, int kBlocksN>
__device__ __forceinline__ void put(half_t* tile, int step, int row, int column, const float (&sum)[kBlocksM][kBlocksN][4]) {
  const int lane = int(threadIdx.x) % 32;
  half_t* to = tile + (row + lane / 4) * step + column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j) {
      *reinterpret_cast<uint32_t*>(to + 16 * i * step + 8 * j) = pack(sum[i][j][0], sum[i][j][1]);
      *reinterpret_cast<uint32_t*>(to + (16 * i + 8) * step + 8 * j) = pack(sum[i][j][2], sum[i][j][3]);
    }
  }
}

// A tile of kM x kN in shared memory to rows and columns of d (m, n) from (first_m, first_n) on.
template <int kM, int kN, int kThreads>
__device__ __forceinline__ void store(half_t* d, const half_t* tile, int first_m, int first_n, int m, int n) {
  constexpr int kChunks = kN / 8, kStep = kN + 8;
  static_assert(kM * kChunks % kThreads == 0, "every thread stores the same number of chunks");
#pragma unroll 4
  for (int i = int(threadIdx.x); i < kM * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (first_m + row < m && first_n + column < n)
      *reinterpret_cast<uint4*>(d + int64_t(first_m + row) * n + first_n + column) =
          *reinterpret_cast<const uint4*>(tile + row * kStep + column);
  }
}

}  // namespace stof::bolt
