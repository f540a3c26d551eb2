// Short sequences: the whole attention of one head, or of one slab of its queries, in a block, with scores in shared memory.
//
// Written from the published design: WMMA tiles of 16 x 16 x 16 with fp16 sums, one score tile a warp, a softmax with one warp
// a row and fp32 registers, values in the keys' place. Ours where the description is silent: registers are capped so that as
// many blocks share a multiprocessor as its 2048 threads allow, and the first values are fetched before the scores are
// computed and stored before the softmax, not after it.
#pragma once

#include "device.cuh"

namespace stof::bytetransformer {

constexpr float kRemoved = -10000.f;   // what a masked score is lowered by
constexpr float kOutside = -1e20f;     // score of a column past the sequence
constexpr float kSumFloor = 1e-6f;

// Rows of one head from packed QKV to a padded array in shared memory, with the bias added on the way: 32 lanes x 2 halves a row.
// Some loads are in flight at once; more would cost registers, and so blocks.
template <int kRows, int kDim, int kWarps>
class RowCopy {
  static constexpr int kPairs = kDim / 2, kPerWarp = 32 / kPairs, kPass = kWarps * kPerWarp;
  static constexpr int kSteps = ceil_div(kRows, kPass), kAtOnce = kSteps <= 4 ? kSteps : 3;
  static_assert(32 % kPairs == 0, "a row must be a whole number of lanes");

 public:
  // `from`: this head's column of the first row; `step`: halves from row to row; rows from `valid` on become zero. Loads begin.
  __device__ __forceinline__ RowCopy(const half_t* from, int step, const half_t* bias, int valid)
      : from_(from + first() * step + 2 * pair()), bias_(bias + 2 * pair()), step_(step), valid_(valid) {
    fetch(0);
  }

  __device__ __forceinline__ void store(half_t* to) {
    to += first() * (kDim + kPad) + 2 * pair();
    const uint32_t shift = *reinterpret_cast<const uint32_t*>(bias_);
    put(to, shift, 0);
#pragma unroll 1
    for (int begin = kAtOnce; begin < kSteps; begin += kAtOnce) {
      fetch(begin);
      put(to, shift, begin);
    }
  }

 private:
  static __device__ __forceinline__ int pair() { return threadIdx.x % 32 % kPairs; }
  static __device__ __forceinline__ int first() { return threadIdx.x / 32 * kPerWarp + threadIdx.x % 32 / kPairs; }

  __device__ __forceinline__ void fetch(int begin) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pass = (begin + i) * kPass;
      value_[i] = first() + pass < valid_ ? *reinterpret_cast<const uint32_t*>(from_ + pass * step_) : 0u;
    }
  }
  __device__ __forceinline__ void put(half_t* to, uint32_t shift, int begin) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pass = (begin + i) * kPass;
      if (first() + pass < kRows)
        *reinterpret_cast<uint32_t*>(to + pass * (kDim + kPad)) = first() + pass < valid_ ? add_pairs(value_[i], shift) : 0u;
    }
  }

  const half_t* from_;
  const half_t* bias_;
  int step_, valid_;
  uint32_t value_[kAtOnce];
};

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
  const int row_step = 3 * width;
  const half_t* const tokens = p.qkv + batch * static_cast<int64_t>(p.seq_len) * row_step + column;
  const half_t* const bias = p.bias + column;
  const int slab_valid = p.seq_len - slab_start < kSlab ? p.seq_len - slab_start : kSlab;

  {
    RowCopy<kSlab, kDim, kWarps> query_rows(tokens + slab_start * row_step, row_step, bias, slab_valid);
    RowCopy<kRows, kDim, kWarps> key_rows(tokens + width, row_step, bias + width, p.seq_len);
    query_rows.store(queries);
    key_rows.store(keys);
  }
  RowCopy<kRows, kDim, kWarps> values(tokens + 2 * width, row_step, bias + 2 * width, p.seq_len);
  block_barrier();

  if (warp < kSlab / kCell * kColumns) {
    const int row = warp / kColumns * kCell, col = warp % kColumns * kCell;
    CellSum sum;
#pragma unroll
    for (int k = 0; k < kDim; k += kCell) sum.add<true>(queries + row * kStep + k, kStep, keys + col * kStep + k, kStep);
    sum.store(scores + row * kScoreStep + col, kScoreStep);
  }
  block_barrier();

  // In the keys' place; the softmax of one warp runs under the loads of another.
  values.store(keys);
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
