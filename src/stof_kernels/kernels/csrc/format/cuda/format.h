// Building masks on the device: dense bool -> canonical cell lists -> the block-wise kernel's layout. No torch here; every
// step takes the buffers it needs and none synchronises with the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace stof::cuda {

struct DenseMask {
  const uint8_t* data;
  int64_t batch_stride, head_stride, q_stride, kv_stride;
  int heads, planes, q_len, kv_len;
};

// A bool table of whole blocks of `block` x `block` positions, a multiple of 16: strides in entries.
struct BlockTable {
  const uint8_t* data;
  int64_t batch_stride, head_stride, row_stride, col_stride;
  int heads, planes, q_len, kv_len, block;
};

// The canonical lists and their capacities; strips and cells are per plane.
struct CellBuffers {
  int *strip_ptr, *cell_col, *cell_slot;
  uint16_t* cell_bits;
  int64_t* counts;
  int64_t cell_capacity, bit_capacity;
};

// Scratch of the builders: all bitmaps of a dense mask, listed or not, and {cells, partial cells, kept pairs, times} per strip,
// or per row of blocks for its strips together; the scan replaces the last, by which kept pairs count, by the first slot.
struct CellScratch {
  uint16_t* words;  // (planes * strips, cells, 16)
  int4* strips;     // (planes * strips or rows)
  int* starts;      // (planes * rows + 1): where each row of blocks starts in the lists
};

cudaError_t pack_cells(const DenseMask& mask, const CellScratch& scratch, cudaStream_t stream);
cudaError_t count_blocks(const BlockTable& table, const CellScratch& scratch, cudaStream_t stream);
cudaError_t scan_cells(const DenseMask& mask, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream);
cudaError_t scan_blocks(const BlockTable& table, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream);
cudaError_t emit_cells(const DenseMask& mask, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream);
cudaError_t emit_blocks(const BlockTable& table, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream);

// The canonical lists as input of the layout.
struct CellView {
  const int *strip_ptr, *cell_col, *cell_slot;
  const uint16_t* cell_bits;
  int64_t* counts;  // a layout that does not fit sets the overflow
  int planes, q_len, kv_len;
};

struct LayoutBuffers {
  int *header, *combines, *items, *col;
  uint32_t* bits;
  int64_t item_capacity, combine_capacity, tile_capacity, slot_capacity;
  int q_tile;
};

// How long lists are cut: chunk > 0 key tiles at most; 0: never; -1: so that `copies` runs of the mask fill `slots` blocks.
struct Chunking {
  int chunk, copies, slots;
};

// Scratch between the steps: per query tile {key tiles, full key tiles, first key tile, first slot}, {first item, items, 0, 0};
// after all of them, unless key sequences are very long, per query tile which columns it lists and which are full.
constexpr int kQueryTileInts = 8;
#ifdef __CUDACC__
__host__ __device__
#endif
inline bool keeps_columns(int kv_len) { return kv_len <= 1 << 17; }
// Ints of that scratch.
inline int64_t layout_scratch(int64_t query_tiles, int kv_len) {
  const int64_t words = (kv_len + 511) / 512;  // 32 cells of 16 keys
  return query_tiles * (kQueryTileInts + (keeps_columns(kv_len) ? 2 * words : 0));
}

cudaError_t count_tiles(const CellView& cells, int q_tile, int* query_tiles, cudaStream_t stream);
// Writes the header and, up to the capacities, the items and combines. With capacities of 0 it only measures.
cudaError_t schedule_items(const CellView& cells, const LayoutBuffers& out, const Chunking& chunking, int* query_tiles,
                           cudaStream_t stream);
cudaError_t fill_tiles(const CellView& cells, const LayoutBuffers& out, int* query_tiles, cudaStream_t stream);

// A table's lists and its layout together, without a way over the lists. Whether that can be done for such a table, the ints of
// scratch that it takes, and the build itself.
bool builds_together(const BlockTable& table, int q_tile);
int64_t together_scratch(const BlockTable& table, int q_tile);
cudaError_t build_together(const BlockTable& table, const CellBuffers& lists, const LayoutBuffers& out,
                           const Chunking& chunking, int* scratch, cudaStream_t stream);

// Longest key sequence the layout's bitmaps in shared memory allow.
constexpr int kMaxLayoutKeys = 1 << 20;

}  // namespace stof::cuda
