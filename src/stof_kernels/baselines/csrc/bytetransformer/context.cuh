// Long path, grouped GEMM 1: weights times values, where the weights are made from the scores on the way into the multiplier.
//
// Written from the published design: tiles of 64 x 64 x 32, four warps of 32 x 32, four stages, fp16 sums, and a prologue on
// the fragments of the scores: exp(x - maximum) / (sum + 1e-6). Ours where it is silent: mma 16 x 8 x 16, 16-byte stores.
#pragma once

#include "grouped.cuh"

namespace stof::bytetransformer {

using ContextVisitor = TileVisitor<kContextTile, false>;

struct ContextShared {
  static constexpr int kDepth = 32, kStages = 4;
  alignas(128) half_t scores[kStages][kContextTile * kDepth];
  alignas(128) half_t values[kStages][kDepth * kLongDim];
};

constexpr float kContextFloor = 1e-6f;
constexpr uint32_t kLowestPair = 0xfbfffbffu;  // -65504 twice: its weight is 0 beside any maximum

// 16-byte chunks of a row of 4 (scores) and of 8 (values): eight rows in turn meet all banks.
__device__ __forceinline__ int weight_chunk(int row, int chunk) { return (4 * row + (chunk ^ (row >> 1 & 3))) * 8; }
__device__ __forceinline__ int value_chunk(int row, int chunk) { return (8 * row + (chunk ^ (row & 7))) * 8; }

// Columns [k0, k0 + 32) of 64 rows of scores; what lies outside gets weight 0. seq_len is a multiple of 8, so chunks are whole.
__device__ __forceinline__ void fetch_score_rows(half_t* stage, const half_t* from, int64_t step, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = threadIdx.x + i * kGroupedThreads, row = at / 4, chunk = at % 4;
    half_t* const to = stage + weight_chunk(row, chunk);
    if (row < rows && 8 * chunk < columns) copy_async16(to, from + row * step + 8 * chunk, true);
    else *reinterpret_cast<uint4*>(to) = make_uint4(kLowestPair, kLowestPair, kLowestPair, kLowestPair);
  }
}

// 32 rows of values; rows from `rows` on become zero.
__device__ __forceinline__ void fetch_value_rows(half_t* stage, const half_t* from, int rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = threadIdx.x + i * kGroupedThreads, row = at / 8, chunk = at % 8;
    copy_async16(stage + value_chunk(row, chunk), from + (row < rows ? row * kLongDim + 8 * chunk : 0), row < rows);
  }
}

__device__ __forceinline__ uint32_t weights_of(uint32_t scores, float2 stats) {
  const float2 x = unpack(scores);
  return pack(exp_fast(x.x - stats.x) * stats.y, exp_fast(x.y - stats.x) * stats.y);
}

// One warp's 32 x 32 sums over a stage's 32 keys. `stats`: maximum and reciprocal sum of rows [16 rows][upper or lower 8].
__device__ __forceinline__ void multiply_context_stage(uint32_t (&sum)[2][4][2], const half_t* scores, const half_t* values, int row0,
                                                       int col0, const float2 (&stats)[2][2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices(a[i], scores + weight_chunk(row0 + 16 * i + lane % 16, 2 * k + lane / 16));
      load_matrices_transposed(b[i], values + value_chunk(16 * k + lane % 16, col0 / 8 + 2 * i + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) a[i][j] = weights_of(a[i][j], stats[i][j % 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_k16(sum[i][j], a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
    }
  }
}

__global__ void __launch_bounds__(kGroupedThreads) grouped_context(LongProblem p) {
  constexpr int kStages = ContextShared::kStages, kDepth = ContextShared::kDepth;
  __shared__ ContextShared shared;
  static_assert(sizeof(ContextShared) == 32 * 1024);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
  const int64_t part = static_cast<int64_t>(p.heads) * p.batch * p.seq_len * kLongDim;
  ContextVisitor visitor(p.lengths, p.batch, p.heads);
  GroupedTile tile;
  for (int number = blockIdx.x; visitor.find(number, tile); number += gridDim.x) {
    const int down = ceil_div(tile.length, kContextTile), head = tile.index / down, row0 = tile.index % down * kContextTile;
    const int64_t plane = static_cast<int64_t>(tile.problem) * p.heads + head;
    const half_t* const scores = p.scores + (plane * p.seq_len + row0) * p.seq_len;
    const half_t* const values = p.split + 2 * part + (static_cast<int64_t>(head) * p.batch + tile.problem) * p.seq_len * kLongDim;
    const int steps = ceil_div(tile.length, kDepth);
    const auto fetch = [&](int step) {
      if (step < steps) {
        const int k0 = step * kDepth, left = tile.length - k0;
        fetch_score_rows(shared.scores[step % kStages], scores + k0, p.seq_len, tile.length - row0, left);
        fetch_value_rows(shared.values[step % kStages], values + k0 * kLongDim, left);
      }
      copy_async_commit();  // also when empty: the wait counts groups
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    float2 stats[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp_row + 8 * i + lane / 4;
      float2 s = make_float2(0.f, 0.f);
      if (row < tile.length) {
        s = reinterpret_cast<const float2*>(p.stats)[plane * p.seq_len + row];
        s.y = divide_fast(1.f, s.y + kContextFloor);
      }
      stats[i / 2][i % 2] = s;
    }
    uint32_t sum[2][4][2] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      block_barrier();  // the stage has arrived for all, and all are done with the one that is fetched next
      fetch(step + kStages - 1);
      multiply_context_stage(sum, shared.scores[step % kStages], shared.values[step % kStages], warp_row, warp_col, stats);
    }
    const int width = p.heads * kLongDim, col = head * kLongDim + warp_col + 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp_row + 8 * i + lane / 4;
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = sum[i / 2][j][i % 2];
      transpose_in_quad(v);
      if (row < tile.length) {
        half_t* const out = p.out + (static_cast<int64_t>(tile.problem) * p.seq_len + row) * width + col;
        *reinterpret_cast<uint4*>(out) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
    block_barrier();  // the stages are free for the next tile
  }
}

}  // namespace stof::bytetransformer
