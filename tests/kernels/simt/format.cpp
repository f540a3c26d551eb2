// The format's builders on the CPU, for ctypes: what bindings/format_cuda.cpp does, with memory from the caller.
#include "attention/cuda/item_order.cuh"
#include "attention/cuda/problem.h"
#include "format/cuda/format.h"

using namespace stof::cuda;

namespace {

LayoutBuffers layout_in(int* ptr, int* col, int* items, int* bits, const int64_t* sizes, int q_tile) {
  return {ptr, ptr + kHeaderInts, items, col, reinterpret_cast<uint32_t*>(bits), sizes[2], sizes[0], sizes[1], sizes[3], q_tile};
}

}  // namespace

extern "C" {

void set_descending(int value) { simt::state().descending = value != 0; }

// Dense bool (planes, q_len, kv_len), contiguous.
void build_cells(const uint8_t* keep, int planes, int q_len, int kv_len, uint16_t* words, int* strips, int* strip_ptr, int* col,
                 int* slot, uint16_t* bits, int64_t* counts, int64_t cell_capacity, int64_t bit_capacity) {
  const int64_t plane = int64_t{q_len} * kv_len;
  const DenseMask mask{keep, plane * planes, plane, kv_len, 1, planes, planes, q_len, kv_len};
  const CellScratch scratch{words, reinterpret_cast<int4*>(strips), nullptr};
  const CellBuffers out{strip_ptr, col, slot, bits, counts, cell_capacity, bit_capacity};
  pack_cells(mask, scratch, nullptr);
  scan_cells(mask, scratch, out, nullptr);
  emit_cells(mask, scratch, out, nullptr);
}

// Bool table (planes, rows, row_stride) of which the first columns count.
void build_blocks(const uint8_t* keep, int planes, int row_stride, int q_len, int kv_len, int block, int* strips, int* starts,
                  int* strip_ptr, int* col, int* slot, uint16_t* bits, int64_t* counts, int64_t cell_capacity,
                  int64_t bit_capacity) {
  const int64_t rows = (q_len + block - 1) / block, plane = rows * row_stride;
  const BlockTable table{keep, plane * planes, plane, row_stride, 1, planes, planes, q_len, kv_len, block};
  const CellScratch scratch{nullptr, reinterpret_cast<int4*>(strips), starts};
  const CellBuffers out{strip_ptr, col, slot, bits, counts, cell_capacity, bit_capacity};
  count_blocks(table, scratch, nullptr);
  scan_blocks(table, scratch, out, nullptr);
  emit_blocks(table, scratch, out, nullptr);
}

// The same table's lists and layout together; sizes: combines, tiles, items, slots that the buffers have room for. False where
// that cannot be done.
bool build_together(const uint8_t* keep, int planes, int row_stride, int q_len, int kv_len, int block, int q_tile, int chunk,
                    int copies, int slots, int* strip_ptr, int* col, int* slot, uint16_t* bits, int64_t* counts,
                    int64_t cell_capacity, int64_t bit_capacity, int* ptr, int* tile_col, int* items, int* tile_bits,
                    const int64_t* sizes) {
  const int64_t rows = (q_len + block - 1) / block, plane = rows * row_stride;
  const BlockTable table{keep, plane * planes, plane, row_stride, 1, planes, planes, q_len, kv_len, block};
  if (!builds_together(table, q_tile)) return false;
  const CellBuffers lists{strip_ptr, col, slot, bits, counts, cell_capacity, bit_capacity};
  std::vector<int> scratch(together_scratch(table, q_tile), -7);
  build_together(table, lists, layout_in(ptr, tile_col, items, tile_bits, sizes, q_tile), {chunk, copies, slots}, scratch.data(),
                 nullptr);
  return true;
}

// The order alone: lengths and full key tiles of all query tiles of 64 in entries 0 and 1 of `scratch`.
void schedule(int planes, int q_len, int chunk, int copies, int slots, int* scratch, int64_t* counts, int* ptr, int* items,
              const int64_t* sizes) {
  const CellView cells{nullptr, nullptr, nullptr, nullptr, counts, planes, q_len, 64};
  schedule_items(cells, layout_in(ptr, nullptr, items, nullptr, sizes, 64), {chunk, copies, slots}, scratch, nullptr);
}

int group_of_copies(int64_t copy_bytes, int items, int copies, int sets) {
  return static_cast<int>(copies_of_group(copy_bytes, items, copies, sets));
}

// Item and copy of every unit, one after the other.
void staying_order(int items, int leading, int copies, int group, int* to) {
  const StayingOrder order{items, leading, copies, group};
  for (int unit = 0; unit < items * copies; ++unit) {
    const Assignment at = order.at(unit);
    to[2 * unit] = at.item, to[2 * unit + 1] = at.copy;
  }
}

// sizes: combines, tiles, items, slots that the buffers have room for.
void build_layout(const int* strip_ptr, const int* cell_col, const int* cell_slot, const uint16_t* cell_bits, int64_t* counts,
                  int planes, int q_len, int kv_len, int q_tile, int chunk, int copies, int slots, int* scratch, int* ptr,
                  int* col, int* items, int* bits, const int64_t* sizes) {
  const CellView cells{strip_ptr, cell_col, cell_slot, cell_bits, counts, planes, q_len, kv_len};
  const LayoutBuffers out = layout_in(ptr, col, items, bits, sizes, q_tile);
  count_tiles(cells, q_tile, scratch, nullptr);
  schedule_items(cells, out, {chunk, copies, slots}, scratch, nullptr);
  fill_tiles(cells, out, scratch, nullptr);
}
}
