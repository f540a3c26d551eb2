// One operand on its way from global to shared memory and from there to the tensor cores.
#pragma once

#include "device.cuh"

namespace stof::bolt {

// Eight consecutive rows at one place of a row lie in eight different groups of banks: where 16-byte chunk `chunk` of `row` goes.
template <int kK>
__device__ __forceinline__ int swizzle(int row) {
  return kK == 64 ? row & 7 : row >> 1 & 3;
}

// Brings tiles of kRows x kK halves of a row-major matrix in, tile after tile along its inner size, by all threads of a block.
template <int kRows, int kK, int kThreads>
class Loader {
  static constexpr int kChunks = kK / 8, kRowsAtOnce = kThreads / kChunks, kPasses = kRows / kRowsAtOnce;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0 && kPasses >= 1 && kPasses <= 32, "passes cover the tile");
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle repeats every eight rows");

 public:
  // Rows from `first` on of a matrix of `rows` x `k`; what lies outside becomes zero.
  __device__ __forceinline__ Loader(const half_t* matrix, int first, int rows, int k) {
    const int row = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
    from_ = matrix + int64_t(first + row) * k + 8 * chunk;
    step_ = int64_t(kRowsAtOnce) * k;
    to_ = row * kK + 8 * (chunk ^ swizzle<kK>(row));
    left_ = k - 8 * chunk;
    passes_ = rows - first <= row ? 0 : ceil_div(rows - first - row, kRowsAtOnce);
  }
  __device__ __forceinline__ void next(half_t* tile) {
    const int passes = left_ > 0 ? passes_ : 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) copy_async16(tile + to_ + i * kRowsAtOnce * kK, from_ + i * step_, i < passes);
    from_ += kK, left_ -= kK;
  }

 private:
  const half_t* from_;
  int64_t step_;
  int to_, left_, passes_;
};

// A lane's row and half chunk within 16 x 16 halves for load_matrices: of a left operand, whose rows are the sum's rows, ...
__device__ __forceinline__ int left_row(int lane) { return lane % 16; }
__device__ __forceinline__ int left_chunk(int lane) { return lane / 16; }
// ... and of a right one, stored with the sum's columns as rows, of which two blocks of eight are loaded at once.
__device__ __forceinline__ int right_row(int lane) { return lane % 8 + lane / 16 * 8; }
__device__ __forceinline__ int right_chunk(int lane) { return lane / 8 % 2; }

// kBlocks x 16 rows x 16 halves of a swizzled tile into registers; `row` and `chunk` are the lane's.
template <int kBlocks, int kK>
__device__ __forceinline__ void fetch(uint32_t (&to)[kBlocks][4], const half_t* tile, int row, int chunk) {
  const half_t* from = tile + row * kK + 8 * (chunk ^ swizzle<kK>(row));
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) load_matrices(to[i], from + i * 16 * kK);
}

// sum += left * right^T over 16 of the inner size.
template <int kInstructionK, int kBlocksM, int kBlocksN>
__device__ __forceinline__ void multiply(float (&sum)[kBlocksM][kBlocksN][4], const uint32_t (&left)[kBlocksM][4],
                                         const uint32_t (&right)[kBlocksN / 2][4]) {
#pragma unroll
  for (int i = 0; i < kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksN; ++j) {
      const uint32_t b0 = right[j / 2][j % 2 * 2], b1 = right[j / 2][j % 2 * 2 + 1];
      if constexpr (kInstructionK == 16) {
        multiply_k16(sum[i][j], left[i], b0, b1);
      } else {
        multiply_k8(sum[i][j], left[i][0], left[i][1], b0);
        multiply_k8(sum[i][j], left[i][2], left[i][3], b1);
      }
    }
  }
}

}  // namespace stof::bolt
