// Dense bool mask, or table of whole blocks -> canonical cell lists, in three launches: counts per strip (of a dense mask with
// the bitmaps of all cells, the only pass over it), a scan over the strips, and the lists.
#include "format.h"
#include "scan.cuh"

namespace stof::cuda {
namespace {

constexpr int kCell = 16;
constexpr int kPackThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kBlockWarps = 8;

__host__ __device__ inline int cells_of(int length) { return (length + kCell - 1) / kCell; }

// Bits of 16 bools; any non-zero byte counts as true.
__device__ __forceinline__ uint32_t pack16(const uint4& bytes) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t ones = __vcmpne4(words[i], 0) & 0x01010101u;
    bits |= (ones * 0x10204080u >> 28) << (4 * i);  // the product gathers the four lowest bits at the top
  }
  return bits;
}

template <bool kVector>
__device__ __forceinline__ uint32_t row_bits(const uint8_t* row, int key, const DenseMask& mask) {
  if (kVector) return pack16(__ldg(reinterpret_cast<const uint4*>(row + key)));
  uint32_t bits = 0;
  for (int c = 0; c < kCell && key + c < mask.kv_len; ++c)
    bits |= static_cast<uint32_t>(row[(key + c) * mask.kv_stride] != 0) << c;
  return bits;
}

__device__ __forceinline__ bool is_full(const uint16_t* words, int rows) {
  uint32_t all = 0xffffu;
  for (int r = 0; r < rows; ++r) all &= words[r];
  return all == 0xffffu;
}

// A block per strip; a thread takes whole cells, so that the 16 rows of its cell are independent loads.
template <bool kVector>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(DenseMask mask, CellScratch scratch) {
  const int strips = cells_of(mask.q_len), cells = cells_of(mask.kv_len);
  const int plane = blockIdx.x / strips, strip = blockIdx.x % strips;
  const int rows = min(kCell, mask.q_len - strip * kCell);
  const uint8_t* base = mask.data + plane / mask.heads * mask.batch_stride + plane % mask.heads * mask.head_stride +
                        static_cast<int64_t>(strip) * kCell * mask.q_stride;
  int listed = 0, partial = 0, kept = 0;
  for (int cell = threadIdx.x; cell < cells; cell += kPackThreads) {
    __align__(16) uint16_t words[kCell];
    uint32_t any = 0, all = 0xffffu;
#pragma unroll
    for (int r = 0; r < kCell; ++r) {
      const uint32_t bits = r < rows ? row_bits<kVector>(base + r * mask.q_stride, cell * kCell, mask) : 0;
      words[r] = static_cast<uint16_t>(bits);
      any |= bits;
      all &= r < rows ? bits : 0xffffu;
      kept += __popc(bits);
    }
    listed += any != 0;
    partial += any != 0 && all != 0xffffu;
    uint4* to = reinterpret_cast<uint4*>(scratch.words + (static_cast<int64_t>(blockIdx.x) * cells + cell) * kCell);
    to[0] = reinterpret_cast<const uint4*>(words)[0];
    to[1] = reinterpret_cast<const uint4*>(words)[1];
  }
  __shared__ int shared[kPackThreads / 32 + 1];
  int listed_sum, partial_sum, kept_sum;
  block_exclusive_scan(listed, shared, listed_sum);
  block_exclusive_scan(partial, shared, partial_sum);
  block_exclusive_scan(kept, shared, kept_sum);
  if (threadIdx.x == 0) scratch.strips[blockIdx.x] = make_int4(listed_sum, partial_sum, kept_sum, 1);
}

// One block: starts of the strips (of all the strips in a row of blocks), clamped to the capacity so that whoever reads the
// lists stays inside them.
__global__ void __launch_bounds__(kScanThreads, 1) scan_kernel(int strips, CellScratch scratch, CellBuffers out) {
  __shared__ int64_t shared[kScanThreads / 32];
  const Range mine = warp_range(strips);
  const int lane = threadIdx.x & 31;
  int64_t cells = 0, slots = 0, kept = 0;
  for (int i = mine.begin + lane; i < mine.end; i += 32) {
    const int4 strip = scratch.strips[i];
    cells += strip.x, slots += strip.y, kept += static_cast<int64_t>(strip.z) * strip.w;
  }
  int64_t all_cells, all_slots, all_kept;
  int64_t cell = before_warp<int64_t>(warp_sum(cells), shared, all_cells);
  int64_t slot = before_warp<int64_t>(warp_sum(slots), shared, all_slots);
  before_warp<int64_t>(warp_sum(kept), shared, all_kept);
  for (int base = mine.begin; base < mine.end; base += 32) {
    const int i = base + lane;
    const int4 strip = i < mine.end ? scratch.strips[i] : make_int4(0, 0, 0, 0);
    int64_t cell_sum, slot_sum;
    const int64_t cell_here = cell + warp_exclusive_scan<int64_t>(strip.x, cell_sum);
    const int64_t slot_here = slot + warp_exclusive_scan<int64_t>(strip.y, slot_sum);
    if (i < mine.end) {
      scratch.starts[i] = static_cast<int>(min(cell_here, out.cell_capacity));
      scratch.strips[i].w = static_cast<int>(min(slot_here, static_cast<int64_t>(0x7fffffff)));
    }
    cell += cell_sum, slot += slot_sum;
  }
  if (threadIdx.x == 0) {
    scratch.starts[strips] = static_cast<int>(min(all_cells, out.cell_capacity));
    out.counts[0] = all_cells;
    out.counts[1] = all_slots;
    out.counts[2] = all_kept;
    out.counts[3] = all_cells > out.cell_capacity || all_slots > out.bit_capacity;
  }
}

__global__ void __launch_bounds__(kPackThreads) emit_kernel(DenseMask mask, CellScratch scratch, CellBuffers out) {
  __shared__ int shared[kPackThreads / 32 + 1];
  const int strips = cells_of(mask.q_len), cells = cells_of(mask.kv_len);
  const int rows = min(kCell, mask.q_len - static_cast<int>(blockIdx.x % strips) * kCell);
  int64_t next_cell = out.strip_ptr[blockIdx.x], next_slot = scratch.strips[blockIdx.x].w;
  for (int base = 0; base < cells; base += kPackThreads) {
    const int cell = base + threadIdx.x;
    __align__(16) uint16_t words[kCell] = {};
    if (cell < cells) {
      const uint4* from =
          reinterpret_cast<const uint4*>(scratch.words + (static_cast<int64_t>(blockIdx.x) * cells + cell) * kCell);
      reinterpret_cast<uint4*>(words)[0] = from[0];
      reinterpret_cast<uint4*>(words)[1] = from[1];
    }
    uint32_t any = 0;
    for (int r = 0; r < kCell; ++r) any |= words[r];
    const bool full = is_full(words, rows);
    // Both ranks in one scan: cells in the low half, slots in the high half; at most 256 of each.
    int total;
    const int rank = block_exclusive_scan((any != 0) + ((any != 0 && !full) << 16), shared, total);
    const int64_t at = next_cell + (rank & 0xffff), slot = next_slot + (rank >> 16);
    if (any != 0 && at < out.cell_capacity) {
      out.cell_col[at] = cell;
      out.cell_slot[at] = full ? -1 : static_cast<int>(min(slot, out.bit_capacity - 1));
    }
    if (any != 0 && !full && slot < out.bit_capacity) {
      uint4* to = reinterpret_cast<uint4*>(out.cell_bits + slot * kCell);
      to[0] = reinterpret_cast<const uint4*>(words)[0];
      to[1] = reinterpret_cast<const uint4*>(words)[1];
    }
    next_cell += total & 0xffff;
    next_slot += total >> 16;
  }
}

// Row `row` of the table of a plane: which blocks of keys its queries attend to.
__device__ __forceinline__ const uint8_t* table_row(const BlockTable& table, int plane, int row) {
  return table.data + plane / table.heads * table.batch_stride + plane % table.heads * table.head_stride +
         static_cast<int64_t>(row) * table.row_stride;
}

struct Blocks {
  int rows, cols, ratio;  // of the table of a plane; cells along a block

  explicit __host__ __device__ Blocks(const BlockTable& t)
      : rows((t.q_len + t.block - 1) / t.block), cols((t.kv_len + t.block - 1) / t.block), ratio(t.block / kCell) {}
};

// A warp per row of blocks, whose strips all list the same cells: what they list together.
__global__ void __launch_bounds__(kBlockWarps * 32) count_blocks_kernel(BlockTable table, CellScratch scratch) {
  const Blocks blocks(table);
  const int index = blockIdx.x * kBlockWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (index >= table.planes * blocks.rows) return;
  const int plane = index / blocks.rows, row = index % blocks.rows, cells = cells_of(table.kv_len);
  const uint8_t* kept_blocks = table_row(table, plane, row);
  int listed = 0, last = 0;
  for (int kb = lane; kb < blocks.cols; kb += 32) {
    if (kept_blocks[kb * table.col_stride] == 0) continue;
    listed += min(blocks.ratio, cells - kb * blocks.ratio);
    last |= kb == blocks.cols - 1;
  }
  listed = __reduce_add_sync(0xffffffffu, listed);
  const int ragged = table.kv_len % kCell, partial = ragged != 0 && __any_sync(0xffffffffu, last);
  const int keys = (listed - partial) * kCell + partial * ragged, queries = min(table.block, table.q_len - row * table.block);
  const int strips = cells_of(queries);
  if (lane == 0) scratch.strips[index] = make_int4(listed * strips, partial * strips, keys, queries);
}

// A warp per strip; the scan left where its row of blocks starts.
__global__ void __launch_bounds__(kBlockWarps * 32) emit_blocks_kernel(BlockTable table, CellScratch scratch,
                                                                      CellBuffers out) {
  const Blocks blocks(table);
  const int strips = cells_of(table.q_len), cells = cells_of(table.kv_len), all_rows = table.planes * blocks.rows;
  const int index = blockIdx.x * kBlockWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (index >= table.planes * strips) return;
  const int plane = index / strips, strip = index % strips, ratio = blocks.ratio, ragged = table.kv_len % kCell;
  const int row = plane * blocks.rows + strip / ratio, nth = strip % ratio;
  const int together = min(ratio, strips - strip / ratio * ratio);  // strips of this row of blocks
  const uint8_t* kept_blocks = table_row(table, plane, strip / ratio);
  const int4 counted = scratch.strips[row];
  const int64_t slot = counted.w + counted.y / together * nth;
  int64_t next = scratch.starts[row] + static_cast<int64_t>(counted.x / together) * nth;
  if (lane == 0) out.strip_ptr[index] = static_cast<int>(min(next, out.cell_capacity));
  if (lane == 0 && index == 0) out.strip_ptr[table.planes * strips] = scratch.starts[all_rows];
  for (int base = 0; base < blocks.cols; base += 32) {
    const int kb = base + lane;
    const bool kept = kb < blocks.cols && kept_blocks[kb * table.col_stride] != 0;
    const uint32_t all = __ballot_sync(0xffffffffu, kept);
    const int64_t at = next + __popc(all & ((1u << lane) - 1)) * ratio;
    const int col = kb * ratio, end = min(ratio, cells - col);
    next += __popc(all) * ratio;
    if (!kept) continue;
    const bool aligned = (reinterpret_cast<uintptr_t>(out.cell_col + at) | reinterpret_cast<uintptr_t>(out.cell_slot + at)) % 16 == 0;
    if (aligned && end % 4 == 0 && (ragged == 0 || col + end < cells) && at + end <= out.cell_capacity) {
      for (int i = 0; i < end; i += 4) {
        *reinterpret_cast<int4*>(out.cell_col + at + i) = make_int4(col + i, col + i + 1, col + i + 2, col + i + 3);
        *reinterpret_cast<int4*>(out.cell_slot + at + i) = make_int4(-1, -1, -1, -1);
      }
      continue;
    }
    for (int i = 0; i < end && at + i < out.cell_capacity; ++i) {
      const bool partial = ragged != 0 && col + i == cells - 1;
      out.cell_col[at + i] = col + i;
      out.cell_slot[at + i] = partial ? static_cast<int>(min(slot, out.bit_capacity - 1)) : -1;
    }
  }
  if (ragged != 0 && kept_blocks[(blocks.cols - 1) * table.col_stride] != 0 && slot < out.bit_capacity && lane < kCell)
    out.cell_bits[slot * kCell + lane] = strip * kCell + lane < table.q_len ? static_cast<uint16_t>((1 << ragged) - 1) : 0;
}

int all_strips(const DenseMask& mask) { return mask.planes * cells_of(mask.q_len); }

unsigned warps_to_blocks(int64_t warps) { return static_cast<unsigned>((warps + kBlockWarps - 1) / kBlockWarps); }

}  // namespace

cudaError_t pack_cells(const DenseMask& mask, const CellScratch& scratch, cudaStream_t stream) {
  if (all_strips(mask) == 0) return cudaSuccess;
  const int64_t strides = mask.batch_stride | mask.head_stride | mask.q_stride;
  const bool vector = mask.kv_stride == 1 && mask.kv_len % kCell == 0 && strides % kCell == 0 &&
                      reinterpret_cast<uintptr_t>(mask.data) % kCell == 0;
  if (vector) pack_kernel<true><<<all_strips(mask), kPackThreads, 0, stream>>>(mask, scratch);
  else pack_kernel<false><<<all_strips(mask), kPackThreads, 0, stream>>>(mask, scratch);
  return cudaGetLastError();
}

cudaError_t scan_cells(const DenseMask& mask, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream) {
  CellScratch to = scratch;
  to.starts = out.strip_ptr;
  scan_kernel<<<1, kScanThreads, 0, stream>>>(all_strips(mask), to, out);
  return cudaGetLastError();
}

cudaError_t emit_cells(const DenseMask& mask, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream) {
  if (all_strips(mask) == 0) return cudaSuccess;
  emit_kernel<<<all_strips(mask), kPackThreads, 0, stream>>>(mask, scratch, out);
  return cudaGetLastError();
}

cudaError_t count_blocks(const BlockTable& table, const CellScratch& scratch, cudaStream_t stream) {
  const int64_t rows = int64_t{table.planes} * Blocks(table).rows;
  if (rows == 0) return cudaSuccess;
  count_blocks_kernel<<<warps_to_blocks(rows), kBlockWarps * 32, 0, stream>>>(table, scratch);
  return cudaGetLastError();
}

cudaError_t scan_blocks(const BlockTable& table, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream) {
  scan_kernel<<<1, kScanThreads, 0, stream>>>(table.planes * Blocks(table).rows, scratch, out);
  return cudaGetLastError();
}

cudaError_t emit_blocks(const BlockTable& table, const CellScratch& scratch, const CellBuffers& out, cudaStream_t stream) {
  const int64_t strips = int64_t{table.planes} * cells_of(table.q_len);
  if (strips == 0) return cudaMemsetAsync(out.strip_ptr, 0, sizeof(int), stream);
  emit_blocks_kernel<<<warps_to_blocks(strips), kBlockWarps * 32, 0, stream>>>(table, scratch, out);
  return cudaGetLastError();
}

}  // namespace stof::cuda
