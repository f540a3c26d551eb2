// Short sequences: the whole attention of one head, or of one slab of its queries, in a block, with scores in shared memory.
//
// Written from the published design: WMMA tiles of 16 x 16 x 16 with fp16 sums, one score tile a warp, a softmax with one warp
// a row and fp32 registers, values in the keys' place. Ours where the description is silent: registers are capped so that as
// many blocks share a multiprocessor as its 2048 threads allow, and values are loaded before the softmax, not after it.
#pragma once

#include "device.cuh"

namespace stof::bytetransformer {

constexpr float kRemoved = -10000.f;   // what a masked score is lowered by
constexpr float kOutside = -1e20f;     // score of a column past the sequence
constexpr float kSumFloor = 1e-6f;

// Rows of one head from packed QKV to a padded array in shared memory, with the bias added on the way: 32 lanes x 2 halves a row.
// `from`: this head's column of the first row; `step`: halves from row to row; rows from `valid` on become zero.
template <int kRows, int kDim, int kWarps>
__device__ __forceinline__ void copy_rows(half_t* to, const half_t* from, int64_t step, const half_t* bias, int valid) {
  constexpr int kPairs = kDim / 2, kPerWarp = 32 / kPairs, kPass = kWarps * kPerWarp;
  constexpr int kSteps = ceil_div(kRows, kPass), kAtOnce = kSteps < 4 ? kSteps : 4;  // loads in flight: more would cost blocks
  static_assert(32 % kPairs == 0, "a row must be a whole number of lanes");
  const int pair = threadIdx.x % 32 % kPairs, first = threadIdx.x / 32 * kPerWarp + threadIdx.x % 32 / kPairs;
  const uint32_t shift = *reinterpret_cast<const uint32_t*>(bias + 2 * pair);
  from += first * step + 2 * pair, to += first * (kDim + kPad) + 2 * pair;
#pragma unroll 1
  for (int begin = 0; begin < kSteps; begin += kAtOnce) {
    uint32_t value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pass = (begin + i) * kPass;
      value[i] = first + pass < valid ? *reinterpret_cast<const uint32_t*>(from + pass * step) : 0u;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pass = (begin + i) * kPass;
      if (first + pass < kRows)
        *reinterpret_cast<uint32_t*>(to + pass * (kDim + kPad)) = first + pass < valid ? add_pairs(value[i], shift) : 0u;
    }
  }
}

// softmax(scale * score - 10000 * (1 - mask)) of one row in place, by one warp; columns from seq_len to kRows become 0.
template <int kRows>
__device__ __forceinline__ void softmax_row(half_t* score, const half_t* mask, int seq_len, float scale) {
  constexpr int kItems = ceil_div(kRows, 32);
  const int lane = threadIdx.x % 32;
  float x[kItems], top = kOutside, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = lane + 32 * i;
    x[i] = col < seq_len ? to_float(score[col]) * scale + (1.f - to_float(mask[col])) * kRemoved : kOutside;
    top = fmaxf(top, x[i]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, shuffle_xor(top, lanes));
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    x[i] = exp_fast(x[i] - top);
    sum += x[i];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int col = lane + 32 * i;
    if (col < kRows) score[col] = from_float<half_t>(divide_fast(x[i], sum + kSumFloor));
  }
}

// Attention of queries [slab_start, slab_start + kSlab) of head blockIdx.x and sequence `batch` over all kRows >= seq_len keys.
template <int kRows, int kSlab, int kDim>
__device__ __forceinline__ void attend(const ShortProblem& p, int batch, int slab_start, unsigned char* shared) {
  constexpr int kWarps = short_warps(kRows, kSlab, kDim), kStep = kDim + kPad, kScoreStep = kRows + kPad;
  constexpr int kColumns = kRows / kCell, kOutColumns = kDim / kCell;
  static_assert(kRows % kCell == 0 && kSlab % kCell == 0 && kDim % kCell == 0);
  // WMMA reads and writes at multiples of 32 bytes.
  static_assert(kCell * kStep * 2 % 32 == 0 && kCell * kScoreStep * 2 % 32 == 0);
  static_assert(kSlab * kStep * 2 % 32 == 0 && kRows * kStep * 2 % 32 == 0);
  half_t* const queries = reinterpret_cast<half_t*>(shared);
  half_t* const keys = queries + kSlab * kStep;
  half_t* const scores = keys + kRows * kStep;
  const int warp = threadIdx.x / 32, width = p.heads * kDim, column = blockIdx.x * kDim;
  const int64_t row_step = 3 * static_cast<int64_t>(width);
  const half_t* const tokens = p.qkv + batch * static_cast<int64_t>(p.seq_len) * row_step + column;
  const half_t* const bias = p.bias + column;
  const int slab_valid = p.seq_len - slab_start < kSlab ? p.seq_len - slab_start : kSlab;

  copy_rows<kSlab, kDim, kWarps>(queries, tokens + slab_start * row_step, row_step, bias, slab_valid);
  copy_rows<kRows, kDim, kWarps>(keys, tokens + width, row_step, bias + width, p.seq_len);
  block_barrier();

  if (warp < kSlab / kCell * kColumns) {
    const int row = warp / kColumns * kCell, col = warp % kColumns * kCell;
    CellSum sum;
#pragma unroll
    for (int k = 0; k < kDim; k += kCell) sum.add<true>(queries + row * kStep + k, kStep, keys + col * kStep + k, kStep);
    sum.store(scores + row * kScoreStep + col, kScoreStep);
  }
  block_barrier();

  // Values take the keys' place; the softmax of one warp runs under the loads of another.
  copy_rows<kRows, kDim, kWarps>(keys, tokens + 2 * width, row_step, bias + 2 * width, p.seq_len);
  const half_t* const mask = p.mask + (batch * static_cast<int64_t>(p.seq_len) + slab_start) * p.seq_len;
  for (int row = warp; row < slab_valid; row += kWarps)
    softmax_row<kRows>(scores + row * kScoreStep, mask + static_cast<int64_t>(row) * p.seq_len, p.seq_len, p.scale);
  block_barrier();

  if (warp < kSlab / kCell * kOutColumns) {
    const int row = warp / kOutColumns * kCell, col = warp % kOutColumns * kCell;
    CellSum sum;
#pragma unroll
    for (int k = 0; k < kRows; k += kCell) sum.add<false>(scores + row * kScoreStep + k, kScoreStep, keys + k * kStep + col, kStep);
    sum.store(queries + row * kStep + col, kStep);
  }
  block_barrier();

  constexpr int kPairs = kDim / 2;
  half_t* const out = p.out + (batch * static_cast<int64_t>(p.seq_len) + slab_start) * width + column;
  for (int i = threadIdx.x; i < slab_valid * kPairs; i += 32 * kWarps) {
    const int row = i / kPairs, pair = i % kPairs;
    *reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row) * width + 2 * pair) =
        *reinterpret_cast<const uint32_t*>(queries + row * kStep + 2 * pair);
  }
}

// A: grid (heads, batch).
template <int kRows, int kDim>
__global__ void __launch_bounds__(32 * short_warps(kRows, kRows, kDim), short_blocks(short_warps(kRows, kRows, kDim))) attend_whole(ShortProblem p) {
  __shared__ __align__(128) unsigned char shared[short_bytes(kRows, kRows, kDim)];
  attend<kRows, kRows, kDim>(p, blockIdx.y, 0, shared);
}

// B: grid (heads, slabs, batch).
template <int kRows, int kDim>
__global__ void __launch_bounds__(32 * short_warps(kRows, slab_rows(kRows), kDim),
                                  short_blocks(short_warps(kRows, slab_rows(kRows), kDim))) attend_slab(ShortProblem p) {
  STOF_DYNAMIC_SHARED(shared);
  attend<kRows, slab_rows(kRows), kDim>(p, blockIdx.z, blockIdx.y * slab_rows(kRows), shared);
}

}  // namespace stof::bytetransformer
