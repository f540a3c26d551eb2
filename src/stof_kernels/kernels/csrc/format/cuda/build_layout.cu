// Canonical cells -> key tiles of the block-wise kernel. A query tile attends to the union of its strips' cells; columns
// that are full in every strip come first, four to a tile, and need no bitmap; the rest, also packed four to a tile, get
// one whose bits lie in the order of the mma accumulators.
#include "layout.cuh"
#include "scan.cuh"

namespace stof::cuda {
namespace {

constexpr int kCell = 16;
constexpr int kTileThreads = 256;

__host__ __device__ inline int blocks_of(int length, int block) { return (length + block - 1) / block; }

// Bitmaps over the key cells of one query tile, in shared memory: listed in some strip, full in every strip. What follows them
// is scratch: the columns full in each strip, and later the ranks.
struct Columns {
  uint32_t *any, *full;
  int words;

  __device__ __forceinline__ uint32_t* scratch() const { return full + words; }
};

__device__ __forceinline__ Columns columns_in(uint32_t* shared, int kv_len) {
  const int words = blocks_of(blocks_of(kv_len, kCell), 32);
  return {shared, shared + words, words};
}

struct QueryTile {
  int first_strip, strips;  // strips that exist
};

__device__ __forceinline__ QueryTile query_tile(const CellView& cells, int q_tile) {
  const int strips = blocks_of(cells.q_len, kCell), per_plane = blocks_of(cells.q_len, q_tile);
  const int plane = blockIdx.x / per_plane, tile = blockIdx.x % per_plane;
  const int first = tile * (q_tile / kCell);
  return {plane * strips + first, min(q_tile / kCell, strips - first)};
}

// ORs each lane's bit into its word. Neighbouring lanes mostly share a word (lists ascend), and one of them speaks for all.
__device__ __forceinline__ void set_bits(uint32_t* any, uint32_t* full, int word, uint32_t bit, bool is_full) {
  const int lane = threadIdx.x & 31;
  uint32_t listed = bit, whole = is_full ? bit : 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_down_sync(0xffffffffu, word, step);
    const uint32_t more = __shfl_down_sync(0xffffffffu, listed, step), more_whole = __shfl_down_sync(0xffffffffu, whole, step);
    if (lane + step < 32 && other == word) listed |= more, whole |= more_whole;
  }
  const int before = __shfl_up_sync(0xffffffffu, word, 1);
  if (word < 0 || (lane > 0 && before == word)) return;
  atomicOr(any + word, listed);
  if (whole != 0) atomicOr(full + word, whole);
}

// Warps share the strips out evenly; a query tile has 4 or 8, a block 8 warps.
__device__ void collect(const CellView& cells, const QueryTile& tile, int q_tile, const Columns& columns) {
  const int width = blocks_of(cells.kv_len, kCell), words = columns.words;
  uint32_t* full_in = columns.scratch();
  for (int w = threadIdx.x; w < words; w += kTileThreads) columns.any[w] = 0;
  for (int w = threadIdx.x; w < words * tile.strips; w += kTileThreads) full_in[w] = 0;
  __syncthreads();
  const int threads = kTileThreads / (q_tile / kCell);  // per strip; whole warps
  const int s = threadIdx.x / threads;
  if (s < tile.strips) {
    const int first = __ldg(cells.strip_ptr + tile.first_strip + s), end = __ldg(cells.strip_ptr + tile.first_strip + s + 1);
    const int lane = threadIdx.x & 31;
    for (int base = first + threadIdx.x % threads - lane; base < end; base += threads) {
      const int i = base + lane;
      const int col = i < end ? __ldg(cells.cell_col + i) : -1, slot = i < end ? __ldg(cells.cell_slot + i) : 0;
      const bool listed = static_cast<unsigned>(col) < static_cast<unsigned>(width);
      set_bits(columns.any, full_in + s * words, listed ? col / 32 : -1, listed ? 1u << col % 32 : 0, slot < 0);
    }
  }
  __syncthreads();
  for (int w = threadIdx.x; w < words; w += kTileThreads) {
    uint32_t full = columns.any[w];
    for (int other = 0; other < tile.strips; ++other) full &= full_in[other * words + w];
    columns.full[w] = full;
  }
  __syncthreads();
}

// Where the counting leaves a query tile's bitmaps for the filling; null if they are too long to keep.
__device__ __forceinline__ uint32_t* kept_columns(const CellView& cells, const Columns& columns, int q_tile, int* query_tiles) {
  if (!keeps_columns(cells.kv_len)) return nullptr;
  const int64_t all = static_cast<int64_t>(cells.planes) * blocks_of(cells.q_len, q_tile);
  return reinterpret_cast<uint32_t*>(query_tiles + all * kQueryTileInts) + static_cast<int64_t>(blockIdx.x) * 2 * columns.words;
}

__global__ void __launch_bounds__(kTileThreads) count_kernel(CellView cells, int q_tile, int* query_tiles) {
  extern __shared__ uint32_t bitmaps[];
  __shared__ int shared[kTileThreads / 32 + 1];
  const Columns columns = columns_in(bitmaps, cells.kv_len);
  collect(cells, query_tile(cells, q_tile), q_tile, columns);
  uint32_t* kept = kept_columns(cells, columns, q_tile, query_tiles);
  int any = 0, full = 0;
  for (int w = threadIdx.x; w < columns.words; w += kTileThreads) {
    any += __popc(columns.any[w]);
    full += __popc(columns.full[w]);
    if (kept != nullptr) kept[w] = columns.any[w], kept[columns.words + w] = columns.full[w];
  }
  int any_sum, full_sum;
  block_exclusive_scan(any, shared, any_sum);
  block_exclusive_scan(full, shared, full_sum);
  if (threadIdx.x == 0) {
    int* mine = query_tiles + static_cast<int64_t>(blockIdx.x) * kQueryTileInts;
    mine[0] = blocks_of(any_sum, 4);
    mine[1] = full_sum / 4;
  }
}

// Where the columns of a query tile go: ranks among the full and among the other columns.
struct Ranks {
  const Columns& columns;
  const int *full_before, *rest_before;  // per word of the bitmaps
  int full_tiles, full_left;             // full tiles; full columns that fill no tile of their own

  // Position 4 * tile + run of a listed column.
  __device__ __forceinline__ int position(int col) const {
    const int word = col / 32;
    const uint32_t below = (1u << col % 32) - 1, any = columns.any[word], full = columns.full[word];
    if (full >> col % 32 & 1) return full_before[word] + __popc(full & below);  // those left over start the mixed tiles
    return 4 * full_tiles + full_left + rest_before[word] + __popc(any & ~full & below);
  }
};

constexpr int kBatch = 8;  // cells whose bitmaps a warp has on the way at once

// Scatters the bitmaps of up to kBatch cells of a strip, from list entry `first`: lanes find which lie in mixed tiles and where,
// then all lanes write each.
__device__ __forceinline__ void scatter_batch(const CellView& cells, int first, int end, int row_block, const Ranks& ranks,
                                              const LayoutBuffers& out, int64_t first_slot) {
  const int lane = threadIdx.x & 31, i = first + lane;
  const bool mine = lane < kBatch && i < end;
  const int col = mine ? __ldg(cells.cell_col + i) : -1, cell_slot = mine ? __ldg(cells.cell_slot + i) : 0;
  const bool listed = static_cast<unsigned>(col) < static_cast<unsigned>(blocks_of(cells.kv_len, kCell));
  const int position = listed ? ranks.position(col) : 0;
  const int mixed = position / 4 - ranks.full_tiles;
  const uint32_t wanted = __ballot_sync(0xffffffffu, listed && mixed >= 0 && first_slot + mixed < out.slot_capacity);
  if (wanted == 0) return;
  const int g = lane >> 2;
  uint32_t upper[kBatch], lower[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int slot = __shfl_sync(0xffffffffu, cell_slot, j);
    upper[j] = lower[j] = 0xffffu;
    if ((wanted >> j & 1) == 0 || slot < 0) continue;
    upper[j] = __ldg(cells.cell_bits + static_cast<int64_t>(slot) * kCell + g);
    lower[j] = __ldg(cells.cell_bits + static_cast<int64_t>(slot) * kCell + g + 8);
  }
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out.bits);
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int where = __shfl_sync(0xffffffffu, position, j);
    if ((wanted >> j & 1) == 0) continue;
    const int64_t word = (first_slot + where / 4 - ranks.full_tiles) * (2 * out.q_tile) + row_block * 32 + lane;
    bytes[word * 4 + where % 4] = static_cast<uint8_t>(accumulator_byte(upper[j], lower[j], lane));
  }
}

// The bitmaps of all cells of a query tile, dealt to the warps in batches.
__device__ void scatter_bits(const CellView& cells, const QueryTile& tile, const Ranks& ranks, const LayoutBuffers& out,
                             int64_t first_slot) {
  int turn = threadIdx.x / 32;  // batches until it is this warp's turn
  for (int s = 0; s < tile.strips; ++s) {
    const int first = __ldg(cells.strip_ptr + tile.first_strip + s), end = __ldg(cells.strip_ptr + tile.first_strip + s + 1);
    const int batches = blocks_of(end - first, kBatch);
    for (; turn < batches; turn += kTileThreads / 32)
      scatter_batch(cells, first + turn * kBatch, end, s, ranks, out, first_slot);
    turn -= batches;
  }
}

__global__ void __launch_bounds__(kTileThreads) fill_kernel(CellView cells, LayoutBuffers out, int* query_tiles) {
  extern __shared__ uint32_t bitmaps[];
  __shared__ int shared[kTileThreads / 32 + 1];
  const QueryTile tile = query_tile(cells, out.q_tile);
  const Columns columns = columns_in(bitmaps, cells.kv_len);
  if (const uint32_t* kept = kept_columns(cells, columns, out.q_tile, query_tiles)) {
    for (int w = threadIdx.x; w < 2 * columns.words; w += kTileThreads) columns.any[w] = kept[w];  // full follows any
    __syncthreads();
  } else {
    collect(cells, tile, out.q_tile, columns);
  }
  int* full_before = reinterpret_cast<int*>(columns.scratch());
  int* rest_before = full_before + columns.words;
  int full_count = 0, rest_count = 0;
  for (int base = 0; base < columns.words; base += kTileThreads) {
    const int w = base + threadIdx.x;
    const uint32_t any = w < columns.words ? columns.any[w] : 0, full = w < columns.words ? columns.full[w] : 0;
    int full_sum, rest_sum;
    const int full_rank = full_count + block_exclusive_scan(__popc(full), shared, full_sum);
    const int rest_rank = rest_count + block_exclusive_scan(__popc(any & ~full), shared, rest_sum);
    if (w < columns.words) full_before[w] = full_rank, rest_before[w] = rest_rank;
    full_count += full_sum;
    rest_count += rest_sum;
  }
  const int* mine = query_tiles + static_cast<int64_t>(blockIdx.x) * kQueryTileInts;
  const int tiles = mine[0], full_tiles = mine[1];
  const int64_t first_tile = mine[2], first_slot = mine[3];
  const Ranks ranks{columns, full_before, rest_before, full_tiles, full_count - 4 * full_tiles};

  const int64_t words = static_cast<int64_t>(tiles - full_tiles) * 2 * out.q_tile;
  const int64_t first_word = first_slot * 2 * out.q_tile, word_limit = out.slot_capacity * 2 * out.q_tile;
  for (int64_t w = threadIdx.x; w < words; w += kTileThreads) {
    if (first_word + w < word_limit) out.bits[first_word + w] = 0;
  }
  const int listed = full_count + rest_count;
  if (threadIdx.x < 4 * tiles - listed && first_tile + tiles <= out.tile_capacity)
    out.col[first_tile * 4 + listed + threadIdx.x] = -1;
  __syncthreads();
  for (int col = threadIdx.x; col < columns.words * 32; col += kTileThreads) {
    if ((columns.any[col / 32] >> col % 32 & 1) == 0) continue;
    const int position = ranks.position(col);
    if (first_tile + position / 4 < out.tile_capacity) out.col[first_tile * 4 + position] = col;
  }
  if (tiles > full_tiles) scatter_bits(cells, tile, ranks, out, first_slot);
  __syncthreads();
  for (int j = threadIdx.x; j < mine[5]; j += kTileThreads) {
    if (mine[4] + j >= out.item_capacity) break;
    int* item = out.items + static_cast<int64_t>(mine[4] + j) * kItemInts;
    const int4 none = make_int4(-1, -1, -1, -1);
    *reinterpret_cast<int4*>(item + 8) =
        item[2] > 0 && item[1] < out.tile_capacity ? reinterpret_cast<const int4*>(out.col)[item[1]] : none;
  }
}

int query_tiles_of(const CellView& cells, int q_tile) { return cells.planes * blocks_of(cells.q_len, q_tile); }

// Bitmaps of the columns and what collect() and fill_kernel keep beside them.
size_t bitmap_bytes(const CellView& cells, int q_tile) {
  return sizeof(uint32_t) * (2 + q_tile / kCell) * blocks_of(blocks_of(cells.kv_len, kCell), 32);
}

// Very long key sequences need more shared memory than a kernel gets without asking.
template <typename Kernel>
cudaError_t allow(Kernel kernel, size_t bytes) {
  if (bytes <= 40 * 1024) return cudaSuccess;  // 48 KiB, less what is static
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace

cudaError_t count_tiles(const CellView& cells, int q_tile, int* query_tiles, cudaStream_t stream) {
  const int blocks = query_tiles_of(cells, q_tile);
  if (blocks == 0) return cudaSuccess;
  const size_t bytes = bitmap_bytes(cells, q_tile);
  const cudaError_t error = allow(count_kernel, bytes);
  if (error != cudaSuccess) return error;
  count_kernel<<<blocks, kTileThreads, bytes, stream>>>(cells, q_tile, query_tiles);
  return cudaGetLastError();
}

cudaError_t fill_tiles(const CellView& cells, const LayoutBuffers& out, int* query_tiles, cudaStream_t stream) {
  const int blocks = query_tiles_of(cells, out.q_tile);
  if (blocks == 0) return cudaSuccess;
  const size_t bytes = bitmap_bytes(cells, out.q_tile);
  const cudaError_t error = allow(fill_kernel, bytes);
  if (error != cudaSuccess) return error;
  fill_kernel<<<blocks, kTileThreads, bytes, stream>>>(cells, out, query_tiles);
  return cudaGetLastError();
}

}  // namespace stof::cuda
