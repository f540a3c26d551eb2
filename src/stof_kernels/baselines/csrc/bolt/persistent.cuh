// Two products in one kernel: a block computes 64 rows of both, and the first result never leaves the chip.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "mainloop.cuh"

namespace stof::bolt {

// The second loop: its left operand is there already, only tiles of the right one b (kN1, kN0) are brought in. `left(i, to)` gives
// the 16-wide slice i of a warp's rows.
template <int kN0, int kN1, int kWarpsM, int kBlocksM, int kBlocksN, typename Left>
__device__ __forceinline__ void second_loop(const half_t* b, half_t* shared, float (&sum)[kBlocksM][kBlocksN][4], const Left& left) {
  constexpr int kTiles = kN0 / kPersistentK, kTileHalves = kN1 * kPersistentK;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Loader<kN1, kPersistentK, 32 * kPersistentWarps> right(b, 0, kN1, kN0);
  const auto load = [&](int tile) {
    if (tile < kTiles) right.next(shared + tile % kPersistentStages * kTileHalves);
    copy_async_commit();
  };
#pragma unroll
  for (int tile = 0; tile < kPersistentStages - 1; ++tile) load(tile);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    copy_async_wait<kPersistentStages - 2>();
    block_barrier();  // this tile is there for all, and all have read the one before
    load(tile + kPersistentStages - 1);
#pragma unroll
    for (int step = 0; step < kPersistentK / 16; ++step) {
      uint32_t fa[kBlocksM][4], fb[kBlocksN / 2][4];
      left(tile * (kPersistentK / 16) + step, fa);
      fetch<kBlocksN / 2, kPersistentK>(fb, shared + tile % kPersistentStages * kTileHalves,
                                        warp / kWarpsM * 8 * kBlocksN + right_row(lane), 2 * step + right_chunk(lane));
      multiply<16>(sum, fa, fb);
    }
  }
  copy_async_wait<0>();
  block_barrier();
}

// Adds the bias and stores a block's second product.
template <int kN1, int kWarpsM, int kBlocksM, int kBlocksN>
__device__ __forceinline__ void store_second(const PersistentProblem& p, half_t* shared, float (&sum)[kBlocksM][kBlocksN][4]) {
  const int warp = int(threadIdx.x) / 32, column = warp / kWarpsM * 8 * kBlocksN;
  finish(sum, p.bias1, p.epilogue1, column, kN1);
  put(shared, kN1 + 8, warp % kWarpsM * 16 * kBlocksM, column, sum);
  block_barrier();
  store<kPersistentRows, kN1, 32 * kPersistentWarps>(p.d, shared, int(blockIdx.x) * kPersistentRows, 0, p.m, kN1);
}

// The first product stays in registers: each warp has 16 rows of it, whole, and its sums become the second one's left operand.
template <int kN0, int kN1>
__global__ void __launch_bounds__(32 * kPersistentWarps) register_kernel(const PersistentProblem p) {
  STOF_DYNAMIC_SHARED(shared);
  using First = Tile<kPersistentRows, kN0, kPersistentK, kPersistentStages, kPersistentWarps, 1, 1, 16>;
  half_t* tiles = reinterpret_cast<half_t*>(shared);
  float first[1][kN0 / 8][4] = {}, second[1][kN1 / 8][4] = {};
  main_loop<First>(p.a, p.b0, int(blockIdx.x) * kPersistentRows, 0, p.m, kN0, p.k, tiles, first);
  finish(first, p.bias0, p.epilogue0, 0, kN0);
  uint32_t kept[kN0 / 16][4];
#pragma unroll
  for (int i = 0; i < kN0 / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float(&from)[4] = first[0][2 * i + e / 2];
      kept[i][e] = pack(from[e % 2 * 2], from[e % 2 * 2 + 1]);
    }
  }
  second_loop<kN0, kN1, kPersistentWarps>(p.b1, tiles, second, [&](int i, uint32_t(&to)[1][4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[0][e] = kept[i][e];
  });
  store_second<kN1, kPersistentWarps>(p, tiles, second);
}

// The first product goes through shared memory: warps share its columns, 2 x 2 of them, and each reads all of 64 rows back.
template <int kN0, int kN1>
__global__ void __launch_bounds__(32 * kPersistentWarps) shared_kernel(const PersistentProblem p) {
  STOF_DYNAMIC_SHARED(shared);
  using First = Tile<kPersistentRows, kN0, kPersistentK, kPersistentStages, 2, 2, 1, 16>;
  constexpr int kStep = kN0 + 8, kRowBlocks = kPersistentRows / 16;
  half_t* kept = reinterpret_cast<half_t*>(shared);
  half_t* tiles = kept + kPersistentRows * kStep;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  {
    float first[First::kBlocksM][First::kBlocksN][4] = {};
    main_loop<First>(p.a, p.b0, int(blockIdx.x) * kPersistentRows, 0, p.m, kN0, p.k, tiles, first);
    const int column = warp / 2 * First::kWarpN;
    finish(first, p.bias0, p.epilogue0, column, kN0);
    put(kept, kStep, warp % 2 * First::kWarpM, column, first);
  }
  block_barrier();
  float second[kRowBlocks][kN1 / (8 * kPersistentWarps)][4] = {};
  second_loop<kN0, kN1, 1>(p.b1, tiles, second, [&](int i, uint32_t(&to)[kRowBlocks][4]) {
    const half_t* from = kept + left_row(lane) * kStep + 16 * i + 8 * left_chunk(lane);
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) load_matrices(to[r], from + 16 * r * kStep);
  });
  store_second<kN1, 1>(p, tiles, second);
}

}  // namespace stof::bolt
