// The multistage loop of a product: copies of the next tiles run while the tensor cores work on the present one.
#pragma once

#include "operand.cuh"

namespace stof::bolt {

// Adds rows [first_m, + T::kM) of a (m, k) times rows [first_n, + T::kN) of b (n, k) to the block's sums. A warp's part of them is
// T::kWarpM x T::kWarpN; warps along k hold sums over their share. Shared memory may be used again when it returns.
template <typename T>
__device__ __forceinline__ void main_loop(const half_t* a, const half_t* b, int first_m, int first_n, int m, int n, int k,
                                          half_t* shared, float (&sum)[T::kBlocksM][T::kBlocksN][4]) {
  constexpr int kSteps = T::kWarpK / 16;
  static_assert(kSteps >= 2, "the copies of a tile start one step before its fragments are needed");
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warp_m = warp % T::kWarpsM, warp_n = warp / T::kWarpsM % T::kWarpsN, warp_k = warp / (T::kWarpsM * T::kWarpsN);
  Loader<T::kM, T::kK, T::kThreads> left(a, first_m, m, k);
  Loader<T::kN, T::kK, T::kThreads> right(b, first_n, n, k);
  const int tiles = ceil_div(k, T::kK);
  int loaded = 0;
  const auto load = [&](int slot) {
    half_t* tile = shared + slot * T::kStageHalves;
    if (loaded++ < tiles) left.next(tile), right.next(tile + T::kM * T::kK);
    copy_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < T::kStages - 1; ++slot) load(slot);

  uint32_t fa[2][T::kBlocksM][4], fb[2][T::kBlocksN / 2][4];
  const int row_a = warp_m * T::kWarpM + left_row(lane), row_b = warp_n * T::kWarpN + right_row(lane);
  const int chunk = warp_k * (T::kWarpK / 8);
  const auto fetch_step = [&](int into, int slot, int step) {
    const half_t* tile = shared + slot * T::kStageHalves;
    fetch<T::kBlocksM, T::kK>(fa[into], tile, row_a, chunk + 2 * step + left_chunk(lane));
    fetch<T::kBlocksN / 2, T::kK>(fb[into], tile + T::kM * T::kK, row_b, chunk + 2 * step + right_chunk(lane));
  };
  copy_async_wait<T::kStages - 2>();
  block_barrier();
  int read = 0, write = T::kStages - 1;
  fetch_step(0, read, 0);
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        copy_async_wait<T::kStages - 2>();
        block_barrier();  // the next tile is there for all, and all have read the last of this one
        read = read + 1 == T::kStages ? 0 : read + 1;
      }
      fetch_step((step + 1) % 2, read, (step + 1) % kSteps);
      if (step == 0) {
        load(write);
        write = write + 1 == T::kStages ? 0 : write + 1;
      }
      multiply<T::kInstructionK>(sum, fa[step % 2], fb[step % 2]);
    }
  }
  static_assert(kSteps % 2 == 0, "the first fragments of a tile are in buffer 0");
  copy_async_wait<0>();
  block_barrier();
}

}  // namespace stof::bolt
