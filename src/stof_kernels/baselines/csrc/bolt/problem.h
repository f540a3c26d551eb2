// What the kernels are told, and the shapes of their blocks. Matrices are contiguous fp16 with inner sizes that 8 divides.
#pragma once

#include <cstdint>

#include "list.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
namespace stof::bolt {
using half_t = __half;
}
#elif !defined(STOF_SIMT)
struct __half;  // host code passes pointers on and no more
namespace stof::bolt {
using half_t = __half;
}
#endif

#if defined(__CUDACC__)
#define STOF_BOTH __host__ __device__
#else
#define STOF_BOTH
#endif

namespace stof::bolt {

// What is done to a sum before it is stored: the first adds nothing, the others a bias of n elements.
enum Epilogue : int { kLinear = 0, kBias = 1, kBiasRelu = 2, kBiasGelu = 3 };

// d[i] (m, n) = epilogue(a[i] (m, k) * b[i] (n, k) transposed) for each of `batch` products; sums in fp32.
struct GemmProblem {
  const half_t* a;
  const half_t* b;
  const half_t* bias;
  half_t* d;
  int m, n, k, batch, epilogue;
};

// d (m, n1) = epilogue1(epilogue0(a (m, k) * b0 (n0, k)^T) * b1 (n1, n0)^T): n0 and n1 are those of the kernel.
struct PersistentProblem {
  const half_t* a;
  const half_t* b0;
  const half_t* bias0;
  const half_t* b1;
  const half_t* bias1;
  half_t* d;
  int m, k, epilogue0, epilogue1;
};

// The inner size that both loops of a persistent kernel take at a time, its rows, pipeline stages and warps.
constexpr int kPersistentRows = 64, kPersistentK = 32, kPersistentStages = 3, kPersistentWarps = 4;

STOF_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// One template of the list.
template <int m, int n, int k, int stages, int warps_m, int warps_n, int warps_k, int instruction_k>
struct Tile {
  static constexpr int kM = m, kN = n, kK = k, kStages = stages, kInstructionK = instruction_k;
  static constexpr int kWarpsM = warps_m, kWarpsN = warps_n, kWarpsK = warps_k, kThreads = 32 * warps_m * warps_n * warps_k;
  static constexpr int kWarpM = m / warps_m, kWarpN = n / warps_n, kWarpK = k / warps_k;
  static constexpr int kBlocksM = kWarpM / 16, kBlocksN = kWarpN / 8;  // tensor-core instructions of a warp
  static constexpr int kStageHalves = (m + n) * k;
  static constexpr int kStoreStep = n + 8;  // halves from row to row of the tile on its way out
  static constexpr int kSharedBytes =
      larger(larger(2 * stages * kStageHalves, 2 * m * kStoreStep), (warps_k - 1) * m * n * 4);
  static_assert(m % (16 * warps_m) == 0 && n % (16 * warps_n) == 0 && k % (16 * warps_k) == 0, "whole instructions per warp");
  static_assert(k == 32 || k == 64, "the order of chunks in shared memory is made for rows of 64 or 128 bytes");
  static_assert(instruction_k == 8 || instruction_k == 16, "tensor-core instructions take 8 or 16");
  static_assert(stages >= 2 && kThreads <= 1024, "a pipeline needs two stages, a block has 1024 threads");
};

// How the tiles of a product are dealt to blocks: groups of 2^log columns of tiles share their rows.
struct Grid {
  unsigned x, y, z;
  int log;
};

// CUTLASS's identity swizzle of up to 8; batched products have their tiles in plain order.
constexpr Grid grid_of(int m, int n, int batch, int tile_m, int tile_n) {
  const int down = ceil_div(m, tile_m), across = ceil_div(n, tile_n);
  const int log = batch > 1 ? 0 : across >= 6 ? 3 : across >= 3 ? 2 : across >= 2 ? 1 : 0;
  return {unsigned(down) << log, unsigned(ceil_div(across, 1 << log)), unsigned(batch), log};
}

// Shared memory of a persistent kernel: the tiles of one loop at a time, and the first product where it is kept there.
constexpr int persistent_bytes(int n0, int n1, bool in_shared) {
  const int first = kPersistentStages * (kPersistentRows + n0) * kPersistentK, second = kPersistentStages * kPersistentK * n1;
  const int kept = in_shared ? kPersistentRows * (n0 + 8) : 0;
  return 2 * (larger(larger(first, second), kPersistentRows * (n1 + 8)) + kept);
}

}  // namespace stof::bolt
