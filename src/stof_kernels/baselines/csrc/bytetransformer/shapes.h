// Launch shapes of the short kernels and limits of the paths: plain C++, so that tests read them without a GPU compiler.
#pragma once

#ifdef __CUDACC__
#define STOF_ANYWHERE __host__ __device__
#else
#define STOF_ANYWHERE
#endif

namespace stof::bytetransformer {

constexpr int kCell = 16;  // rows and columns of a WMMA tile
constexpr int kPad = 8;    // halves between rows of a shared array: 144-byte steps spread rows over the banks

STOF_ANYWHERE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
STOF_ANYWHERE constexpr int larger(int a, int b) { return a > b ? a : b; }

// A: one block holds the whole sequence. B: blocks of `slab` query rows against all keys. `rows` is the length in tiles of 16.
constexpr bool fits_whole(int seq_len, int head_dim) {
  return (head_dim == 64 && seq_len <= 80) || (head_dim == 16 && seq_len <= 48);
}
constexpr bool fits_slabs(int seq_len, int head_dim) { return head_dim == 64 && seq_len > 80 && seq_len <= 352; }

STOF_ANYWHERE constexpr int slab_rows(int rows) {
  if (rows == 112 || rows == 128) return 64;
  if (rows <= 160) return 48;
  return rows <= 256 ? 32 : 16;
}

// One warp per tile of scores, and enough warps for one tile of output each.
STOF_ANYWHERE constexpr int short_warps(int rows, int slab, int head_dim) {
  return (slab / kCell) * larger(rows / kCell, head_dim / kCell);
}
// Queries, then keys or values, then scores.
STOF_ANYWHERE constexpr int short_bytes(int rows, int slab, int head_dim) {
  return 2 * ((slab + rows) * (head_dim + kPad) + slab * (rows + kPad));
}

// Blocks that are to share a multiprocessor of 2048 threads; four are enough to hide latency.
STOF_ANYWHERE constexpr int short_blocks(int warps) { return 64 / warps < 4 ? 64 / warps : 4; }

// Long path.
constexpr int kLongDim = 64, kLongFirst = 385, kLongLast = 1024, kLongStep = 8;
constexpr int kScoreTile = 128;      // rows and columns of a tile of grouped GEMM 0
constexpr int kContextTile = 64;     // rows of a tile of grouped GEMM 1
constexpr int kGroupedThreads = 128;

constexpr bool fits_long(int seq_len, int head_dim) {
  return head_dim == kLongDim && seq_len >= kLongFirst && seq_len <= kLongLast && seq_len % kLongStep == 0;
}

// Unfused path: 32 threads a head, rows in registers to 1024 keys and as floats in shared memory above.
constexpr int kMaxHeads = 32, kMaxRegisterKeys = 1024, kMaxSoftmaxBytes = 64 * 1024;

constexpr bool fits_unfused(int seq_len, int heads) {
  return heads <= kMaxHeads && (seq_len <= kMaxRegisterKeys || 4LL * heads * seq_len <= kMaxSoftmaxBytes);
}

// Threads of a LayerNorm block: columns / 2, or / 4 where that is too many; whole warps. 0: no kernel for this width.
constexpr int norm_threads(int columns) {
  if (columns % 64 == 0 && columns / 2 <= 512) return columns / 2;
  return columns % 128 == 0 && columns / 4 <= 1024 ? columns / 4 : 0;
}

namespace checked {
constexpr bool slabs(int rows, int slab, int threads, int bytes) {
  return slab_rows(rows) == slab && 32 * short_warps(rows, slab, 64) == threads && short_bytes(rows, slab, 64) == bytes;
}
constexpr bool whole(int rows, int threads, int bytes) {
  return 32 * short_warps(rows, rows, 64) == threads && short_bytes(rows, rows, 64) == bytes;
}
static_assert(whole(16, 128, 5376) && whole(32, 256, 11776) && whole(48, 384, 19200) && whole(64, 512, 27648));
static_assert(whole(80, 800, 37120));
static_assert(slabs(96, 48, 576, 30720) && slabs(112, 64, 896, 40704) && slabs(128, 64, 1024, 45056));
static_assert(slabs(144, 48, 864, 42240) && slabs(160, 48, 960, 46080));
static_assert(slabs(176, 32, 704, 41728) && slabs(256, 32, 1024, 58368));
static_assert(slabs(272, 16, 544, 50432) && slabs(352, 16, 704, 64512));
}  // namespace checked

}  // namespace stof::bytetransformer
