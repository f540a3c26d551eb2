// Long path, grouped GEMM 0: scores of all sequences and heads, masked, with partial softmax statistics per column tile.
//
// Written from the published design: tiles of 128 x 128 x 16, four warps of 64 x 64, mma 16 x 8 x 8 with fp16 sums, three
// stages of asynchronous copies, a persistent grid, the epilogue in registers. Ours where the description is silent: lanes of
// a quad exchange sums so that masks and scores move 16 bytes at a time; two warps side by side merge through shared memory.
#pragma once

#include <cmath>

#include "grouped.cuh"

namespace stof::bytetransformer {

using ScoreVisitor = TileVisitor<kScoreTile, true>;

struct ScoreShared {
  static constexpr int kDepth = 16, kStages = 3;
  alignas(128) half_t queries[kStages][kScoreTile * kDepth];
  alignas(128) half_t keys[kStages][kScoreTile * kDepth];
  float2 merge[2][kScoreTile];
};

// 16-byte chunk `chunk` (0 or 1) of `row` in a stage: eight rows in turn meet all banks.
__device__ __forceinline__ int score_chunk(int row, int chunk) { return (2 * row + (chunk ^ (row >> 2 & 1))) * 8; }

// 128 rows x 16 halves from a (rows, 64) matrix; rows from `valid` on become zero.
__device__ __forceinline__ void fetch_score_stage(half_t* stage, const half_t* from, int valid) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = threadIdx.x + i * kGroupedThreads, row = at / 2, chunk = at % 2;
    copy_async16(stage + score_chunk(row, chunk), from + (row < valid ? row * kLongDim + chunk * 8 : 0), row < valid);
  }
}

// One warp's 64 x 64 sums over a stage's 16 columns: two steps of 8.
__device__ __forceinline__ void multiply_score_stage(uint32_t (&sum)[4][8][2], const half_t* queries, const half_t* keys,
                                                     int row0, int col0) {
  const int lane = threadIdx.x % 32;
  uint32_t a[4][4], b[4][4];  // [16 rows][rows 0-7 k 0-7, rows 8-15 k 0-7, rows 0-7 k 8-15, rows 8-15 k 8-15]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_matrices(a[i], queries + score_chunk(row0 + 16 * i + lane % 16, lane / 16));
    load_matrices(b[i], keys + score_chunk(col0 + 16 * i + lane % 16, lane / 16));
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) multiply_k8(sum[i][j], a[i][2 * k], a[i][2 * k + 1], b[j / 2][2 * k + j % 2]);
    }
  }
}

// Mask of one row within one warp's 64 columns: [group of 32 columns], 8 columns a lane.
using MaskRow = uint4[2];

// Which rows and columns of a tile exist: lane t of a quad has columns `col` .. `col` + 7 of both groups of 32.
struct Bounds {
  int row, col, length;
  __device__ __forceinline__ bool valid(int local, int group) const { return row + local < length && col + 32 * group < length; }
};

// `mask` points at this lane's first row and column.
__device__ __forceinline__ void fetch_mask(MaskRow& keep, const half_t* mask, int step, const Bounds& at, int local) {
#pragma unroll
  for (int group = 0; group < 2; ++group)
    if (at.valid(local, group)) keep[group] = *reinterpret_cast<const uint4*>(mask + local * step + 32 * group);
}

// Masked scores of one row within one warp's 64 columns.
struct ScoreRow {
  float x[2][8];
  float top, sum;
};

__device__ __forceinline__ void mask_row(ScoreRow& r, uint32_t (&raw)[2][4], const MaskRow& keep, const Bounds& at, int local,
                                         float scale) {
  r.top = -INFINITY, r.sum = 0.f;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    transpose_in_quad(raw[group]);
    if (!at.valid(local, group)) continue;
    const uint32_t pairs[4] = {keep[group].x, keep[group].y, keep[group].z, keep[group].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 score = unpack(raw[group][j]), shift = unpack(scale_pair(pairs[j], 10000.f, -10000.f));
      r.x[group][2 * j] = scale * score.x + shift.x, r.x[group][2 * j + 1] = scale * score.y + shift.y;
      r.top = fmaxf(r.top, fmaxf(r.x[group][2 * j], r.x[group][2 * j + 1]));
    }
  }
  r.top = fmaxf(r.top, shuffle_xor(r.top, 1));
  r.top = fmaxf(r.top, shuffle_xor(r.top, 2));
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    if (!at.valid(local, group)) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) r.sum += exp_fast(r.x[group][j] - r.top);
  }
  r.sum += shuffle_xor(r.sum, 1);
  r.sum += shuffle_xor(r.sum, 2);
}

__device__ __forceinline__ float2 merge_stats(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  return {top, a.y * exp_fast(a.x - top) + b.y * exp_fast(b.x - top)};
}

// Writes a warp's masked scores as fp16 and leaves each row's maximum and sum in `merge`. `out` and `mask` point at this lane's
// first row and column. The mask of the next row is on its way while one row is worked on; plain loads, which stay between the
// stores around them: free to move, they were all hoisted to the front and cost a third of the blocks their registers.
__device__ __forceinline__ void write_scores(uint32_t (&sum)[4][8][2], half_t* out, const half_t* mask, int step, const Bounds& at,
                                             float scale, float2* merge) {
  const int lane = threadIdx.x % 32;
  MaskRow keep[2];
  fetch_mask(keep[0], mask, step, at, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int local = 8 * i;
    if (i < 7) fetch_mask(keep[(i + 1) % 2], mask, step, at, local + 8);
    uint32_t raw[2][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) raw[j / 4][j % 4] = sum[i / 2][j][i % 2];
    ScoreRow r;
    mask_row(r, raw, keep[i % 2], at, local, scale);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if (!at.valid(local, group)) continue;
      const float* x = r.x[group];
      *reinterpret_cast<uint4*>(out + local * step + 32 * group) =
          make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
    if (lane % 4 == 0) merge[local + lane / 4] = make_float2(r.top, r.sum);
  }
}

__global__ void __launch_bounds__(kGroupedThreads, 3) grouped_scores(LongProblem p) {
  constexpr int kStages = ScoreShared::kStages, kDepth = ScoreShared::kDepth, kSteps = kLongDim / kDepth;
  __shared__ ScoreShared shared;
  static_assert(sizeof(ScoreShared) <= 48 * 1024 && kGroupedThreads == kScoreTile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 64, warp_col = warp % 2 * 64;
  const int64_t part = static_cast<int64_t>(p.heads) * p.batch * p.seq_len * kLongDim;
  const int column_tiles = ceil_div(p.seq_len, kScoreTile);
  ScoreVisitor visitor(p.lengths, p.batch, p.heads);
  GroupedTile tile;
  for (int number = blockIdx.x; visitor.find(number, tile); number += gridDim.x) {
    const int across = ceil_div(tile.length, kScoreTile), head = tile.index / (across * across);
    const int in_head = tile.index - head * across * across;
    const int row0 = in_head / across * kScoreTile, col0 = in_head % across * kScoreTile;
    const half_t* const tokens = p.split + (static_cast<int64_t>(head) * p.batch + tile.problem) * p.seq_len * kLongDim;
    const half_t* const queries = tokens + row0 * kLongDim;
    const half_t* const keys = tokens + part + col0 * kLongDim;
    const auto fetch = [&](int step) {
      if (step < kSteps) {
        fetch_score_stage(shared.queries[step % kStages], queries + step * kDepth, tile.length - row0);
        fetch_score_stage(shared.keys[step % kStages], keys + step * kDepth, tile.length - col0);
      }
      copy_async_commit();  // also when empty: the wait counts groups
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    const Bounds at{row0 + warp_row + lane / 4, col0 + warp_col + 8 * (lane % 4), tile.length};
    const half_t* const mask = p.mask + (static_cast<int64_t>(tile.problem) * p.seq_len + at.row) * p.seq_len + at.col;
    uint32_t sum[4][8][2] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      copy_async_wait<kStages - 2>();
      block_barrier();  // the stage has arrived for all, and all are done with the one that is fetched next
      fetch(step + kStages - 1);
      multiply_score_stage(sum, shared.queries[step % kStages], shared.keys[step % kStages], warp_row, warp_col);
    }
    const int plane = tile.problem * p.heads + head;
    half_t* const out = p.scores + (static_cast<int64_t>(plane) * p.seq_len + at.row) * p.seq_len + at.col;
    write_scores(sum, out, mask, p.seq_len, at, p.scale, shared.merge[warp % 2] + warp_row);
    block_barrier();  // merge is whole, and the stages are free for the next tile
    const int row = row0 + threadIdx.x;
    if (row < tile.length) {
      const float2 stats = merge_stats(shared.merge[0][threadIdx.x], shared.merge[1][threadIdx.x]);
      const int64_t at = (static_cast<int64_t>(plane) * column_tiles + col0 / kScoreTile) * p.seq_len + row;
      reinterpret_cast<float2*>(p.partials)[at] = stats;
    }
  }
}

// Grid (batch, heads), a thread a row: maximum and sum of whole rows.
__global__ void __launch_bounds__(kLongLast) reduce_stats(LongProblem p) {
  const int length = p.lengths[blockIdx.x], row = threadIdx.x, plane = blockIdx.x * p.heads + blockIdx.y;
  if (row >= length) return;
  const float2* const partials =
      reinterpret_cast<const float2*>(p.partials) + static_cast<int64_t>(plane) * ceil_div(p.seq_len, kScoreTile) * p.seq_len + row;
  float top = -INFINITY, sum = 0.f;
  for (int i = 0; i < ceil_div(length, kScoreTile); ++i) top = fmaxf(top, partials[static_cast<int64_t>(i) * p.seq_len].x);
  for (int i = 0; i < ceil_div(length, kScoreTile); ++i) {
    const float2 part = partials[static_cast<int64_t>(i) * p.seq_len];
    sum += part.y * exp_fast(part.x - top);
  }
  reinterpret_cast<float2*>(p.stats)[static_cast<int64_t>(plane) * p.seq_len + row] = make_float2(top, sum);
}

}  // namespace stof::bytetransformer
