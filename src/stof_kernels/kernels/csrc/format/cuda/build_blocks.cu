// A table of whole blocks -> canonical lists and layout together, in two launches: a survey of which key tiles each query tile
// attends to, and a pass in which every block sums up the survey for itself and writes its share of both. For blocks that are
// multiples of a key tile and of the query tile: then a list is key tiles of the table in their order, full but for one that
// the end of the keys may cut, and no column has to be looked for. The result is what the way over the lists gives.
#include "attention/cuda/launch.h"
#include "block_sums.cuh"

namespace stof::cuda {
namespace {

constexpr int kSurveyWarps = 8, kSurveyBatch = 8;

// A warp per query tile.
__global__ void __launch_bounds__(kSurveyWarps * 32) survey_kernel(BlockTable table, int q_tile, Survey to) {
  wait_for_predecessor();
  let_successor_start();
  const Sizes sizes(table, q_tile);
  const int index = blockIdx.x * kSurveyWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (index >= sizes.n) return;
  const int plane = index / sizes.per_plane, row = (index - plane * sizes.per_plane) / (table.block / q_tile);
  const int tiles_of_block = table.block / kTileKeys;
  const uint8_t* blocks = table.data + plane / table.heads * table.batch_stride + plane % table.heads * table.head_stride +
                          static_cast<int64_t>(row) * table.row_stride;
  uint32_t* words = to.kept + static_cast<int64_t>(index) * sizes.words;
  int length = 0;
  uint32_t word = 0;
  for (int base = 0; base < sizes.words; base += kSurveyBatch) {
    bool kept[kSurveyBatch];  // so many loads are on the way at once
#pragma unroll
    for (int j = 0; j < kSurveyBatch; ++j) {
      const int tile = (base + j) * 32 + lane;
      const int block = tiles_of_block == 1 ? tile : tile / tiles_of_block;
      kept[j] = tile < sizes.key_tiles && blocks[block * table.col_stride] != 0;
    }
#pragma unroll
    for (int j = 0; j < kSurveyBatch; ++j) {
      if (base + j >= sizes.words) break;
      word = __ballot_sync(0xffffffffu, kept[j]);
      length += __popc(word);
      if (lane == 0) words[base + j] = word;
    }
  }
  const bool has_cut = sizes.cut && (word >> (sizes.key_tiles - 1) % 32 & 1) != 0;
  if (lane == 0) to.lengths[index] = 2 * length + has_cut;
}

// A query tile that a warp writes: what the survey says of it, and where it goes.
struct Entry {
  int index, length, item, part, combine;
  Sum before;
};

// Bits of the cut key tile's runs in a query tile's bitmap.
__device__ void write_bitmap(const BlockTable& table, const Sizes& sizes, int tile, int strips, int64_t slot,
                             const LayoutBuffers& out) {
  const int lane = threadIdx.x & 31, last = sizes.cells - 1;
  const uint32_t partial = (1u << sizes.ragged) - 1;
  for (int s = 0; s < sizes.strips; ++s) {
    const int row = tile * out.q_tile + s * kCell + (lane >> 2);
    const uint32_t upper = row < table.q_len ? partial : 0, lower = row + 8 < table.q_len ? partial : 0;
    uint32_t word = 0;
    for (int r = 0; r < kRuns && s < strips; ++r) {
      const int col = (sizes.key_tiles - 1) * kRuns + r;
      const bool full = col < last || (col == last && sizes.ragged == 0);
      const uint32_t byte = full ? 0xffu : col == last ? accumulator_byte(upper, lower, lane) : 0;
      word |= byte << 8 * r;
    }
    out.bits[slot * 2 * out.q_tile + s * 32 + lane] = word;
  }
}

// Its entries of strip_ptr, and the words of the cells that the end of the keys cuts.
__device__ void write_strips(const BlockTable& table, const Sizes& sizes, const Entry& entry, int plane, int tile, int strips,
                             const CellBuffers& lists) {
  const int lane = threadIdx.x & 31, first = tile * sizes.strips, all_strips = parts_of(table.q_len, kCell);
  const int64_t at = listed_in(sizes, entry.before), width = cells_in(sizes, tally(entry.length));
  int* ptr = lists.strip_ptr + static_cast<int64_t>(plane) * all_strips + first;
  // Where the last strip ends is entry `strips` of the last query tile.
  if (lane < strips + (entry.index == sizes.n - 1))
    ptr[lane] = static_cast<int>(min(at + lane * width, lists.cell_capacity));
  if ((entry.length & 1) == 0 || sizes.ragged == 0) return;
  const int64_t row = bit_rows_in(sizes, entry.before);
  for (int s = 0; s < strips && row + s < lists.bit_capacity; ++s) {
    if (lane < kCell)
      lists.cell_bits[(row + s) * kCell + lane] =
          (first + s) * kCell + lane < table.q_len ? static_cast<uint16_t>((1 << sizes.ragged) - 1) : 0;
  }
}

// The cells of one key tile, in every strip: entry `rank` of the query tile's list.
__device__ __forceinline__ void write_cells(const Sizes& sizes, int key_tile, int64_t at, int width, int bit_row, int strips,
                                            const CellBuffers& lists) {
  const int col = key_tile * kRuns;
  if (col + kRuns <= sizes.cells - (sizes.ragged != 0)) {
    for (int s = 0; s < strips; ++s, at += width) {
      int *cols = lists.cell_col + at, *slots = lists.cell_slot + at;
      const bool aligned = (reinterpret_cast<uintptr_t>(cols) | reinterpret_cast<uintptr_t>(slots)) % 16 == 0;
      if (aligned && at + kRuns <= lists.cell_capacity) {
        *reinterpret_cast<int4*>(cols) = make_int4(col, col + 1, col + 2, col + 3);
        *reinterpret_cast<int4*>(slots) = make_int4(-1, -1, -1, -1);
        continue;
      }
      for (int r = 0; r < kRuns && at + r < lists.cell_capacity; ++r) cols[r] = col + r, slots[r] = -1;
    }
    return;
  }
  for (int s = 0; s < strips; ++s, at += width) {
    for (int r = 0; r < kRuns && col + r < sizes.cells && at + r < lists.cell_capacity; ++r) {
      const bool partial = sizes.ragged != 0 && col + r == sizes.cells - 1;
      lists.cell_col[at + r] = col + r;
      lists.cell_slot[at + r] = partial ? static_cast<int>(min(int64_t{bit_row} + s, lists.bit_capacity - 1)) : -1;
    }
  }
}

// The item that begins with key tile `rank` of a query tile's list, or -1.
__device__ __forceinline__ int item_from(const Tile& tile, int rank) {
  if (tile.items == 1) return rank == 0 ? 0 : -1;
  const int base = tile.length / tile.items, more = tile.length % tile.items, longer = more * (base + 1);
  const int j = rank < longer ? rank / (base + 1) : more + (rank - longer) / base;
  return item_begin(tile, j) == rank ? j : -1;
}

// Writes down the numbers of the bits of 32 words, a word a lane: masks keep few of them, and lanes should not wait for what is
// not kept. Returns how many.
__device__ __forceinline__ int list_kept(uint32_t word, uint16_t* list) {
  const int first = 32 * static_cast<int>(threadIdx.x & 31);
  int count, at = warp_exclusive_scan(__popc(word), count);
  for (; word != 0; word &= word - 1) list[at++] = static_cast<uint16_t>(first + __ffs(word) - 1);
  __syncwarp();
  return count;
}

// All of one query tile, by a warp; `key_tiles` is its place for a list of them.
__device__ void write_query_tile(const BlockTable& table, const Sizes& sizes, const Survey& survey, const Totals& totals,
                                 const Entry& entry, uint16_t* key_tiles, const CellBuffers& lists, const LayoutBuffers& out) {
  const int lane = threadIdx.x & 31;
  const int64_t most = 0x7fffffff;  // far over any capacity
  const Tile tile = tile_at(entry.length, true, totals.chunk, totals.longest_item);
  const int plane = entry.index / sizes.per_plane, in_plane = entry.index - plane * sizes.per_plane;
  const int strips = in_plane == sizes.per_plane - 1 ? sizes.end_strips : sizes.strips;
  const Place place{plane, in_plane, static_cast<int>(min(tiles_in(entry.before.all), most)),
                    static_cast<int>(min(cuts_in(entry.before.all), most))};
  for (int j = lane; j < tile.items && entry.item + j < out.item_capacity; j += 32)
    write_item(tile, place, entry.item + j, entry.part, j, out);
  if (lane == 0 && tile.length == 0 && entry.item < out.item_capacity)
    *reinterpret_cast<int4*>(out.items + static_cast<int64_t>(entry.item) * kItemInts + 8) = make_int4(-1, -1, -1, -1);
  if (lane == 0 && tile.items > 1 && entry.combine < out.combine_capacity)
    *reinterpret_cast<int4*>(out.combines + static_cast<int64_t>(entry.combine) * kCombineInts) =
        make_int4(in_plane, entry.part, tile.items, plane);
  write_strips(table, sizes, entry, plane, in_plane, strips, lists);
  if ((entry.length & 1) != 0 && place.first_slot < out.slot_capacity)
    write_bitmap(table, sizes, in_plane, strips, place.first_slot, out);

  const int64_t first_cell = listed_in(sizes, entry.before);
  const int width = static_cast<int>(cells_in(sizes, tally(entry.length)));
  const int bit_row = static_cast<int>(min(bit_rows_in(sizes, entry.before), most));
  const uint32_t* words = survey.kept + static_cast<int64_t>(entry.index) * sizes.words;
  int before = 0;
  for (int base = 0; base < sizes.words; base += kListWords) {
    const int count = list_kept(base + lane < sizes.words ? words[base + lane] : 0, key_tiles);
    for (int i = lane; i < count; i += 32) {
      const int key_tile = base * 32 + key_tiles[i], rank = before + i;
      const int col = key_tile * kRuns, left = sizes.cells - col;
      const int4 runs = make_int4(col, left > 1 ? col + 1 : -1, left > 2 ? col + 2 : -1, left > 3 ? col + 3 : -1);
      if (int64_t{place.first_tile} + rank < out.tile_capacity)
        reinterpret_cast<int4*>(out.col)[int64_t{place.first_tile} + rank] = runs;
      const int begun = item_from(tile, rank);
      if (begun >= 0 && entry.item + begun < out.item_capacity)
        *reinterpret_cast<int4*>(out.items + static_cast<int64_t>(entry.item + begun) * kItemInts + 8) = runs;
      write_cells(sizes, key_tile, first_cell + int64_t{rank} * kRuns, width, bit_row, strips, lists);
    }
    before += count;
    __syncwarp();  // the list may be written again
  }
}

// By one thread: the counts of the lists and the header of the layout.
__device__ void write_totals(const BlockTable& table, const Sizes& sizes, const Totals& totals, const CellBuffers& lists,
                             const LayoutBuffers& out) {
  const int64_t cut_keys = int64_t{sizes.key_tiles} * kTileKeys - table.kv_len;
  const int64_t keys = kTileKeys * tiles_in(totals.all.all) - cuts_in(totals.all.all) * cut_keys;
  const int64_t end_keys = kTileKeys * tiles_in(totals.all.ends) - cuts_in(totals.all.ends) * cut_keys;
  const int64_t listed = listed_in(sizes, totals.all), bit_rows = bit_rows_in(sizes, totals.all);
  const bool over = listed > lists.cell_capacity || bit_rows > lists.bit_capacity;
  lists.counts[0] = listed;
  lists.counts[1] = bit_rows;
  lists.counts[2] = out.q_tile * keys - (int64_t{sizes.per_plane} * out.q_tile - table.q_len) * end_keys;
  lists.counts[3] = over;
  write_header(out, totals.items, totals.parts, totals.combines, tiles_in(totals.all.all), cuts_in(totals.all.all),
               totals.longest_item, totals.leading, over, lists.counts);
}

__global__ void __launch_bounds__(kThreads, 2)
    write_kernel(BlockTable table, Survey survey, CellBuffers lists, LayoutBuffers out, Chunking chunking, int per_block) {
  __shared__ Shared shared;
  wait_for_predecessor();
  let_successor_start();
  const Sizes sizes(table, out.q_tile);
  const int first = blockIdx.x * per_block, end = min(first + per_block, sizes.n);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Totals totals = totals_of(sizes, survey, chunking, first, shared);
  if (!totals.in_order) order_items(sizes, survey, first, totals, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_totals(table, sizes, totals, lists, out);

  Sum before = totals.before;
  int part = totals.parts_before, combine = totals.combines_before;
  for (int base = first; base < end; base += kWarps) {  // a query tile per warp; every warp knows of those before its own
    const int i = base + lane;
    const bool exists = lane < kWarps && i < end;
    const int length = exists ? survey.lengths[i] : 0;
    const int mine = short_tally(length), at_end = exists && ends_plane(sizes, i) ? mine : 0;
    int all, ends = 0, ends_here = 0;
    const int here = warp_exclusive_scan(mine, all);
    if (sizes.cut_rows) ends_here = warp_exclusive_scan(at_end, ends);
    Entry entry{base + warp, __shfl_sync(0xffffffffu, length, warp), base + warp, 0, 0, before};
    entry.before.all += lengthened(__shfl_sync(0xffffffffu, here, warp));
    entry.before.ends += lengthened(__shfl_sync(0xffffffffu, ends_here, warp));
    if (!totals.in_order) {
      const Tile tile = tile_at(length, exists, totals.chunk, totals.longest_item);
      const Peers peers = peers_of(tile);
      const int item = tile.bin >= 0 ? shared.cursor[tile.bin] + peers.before : 0;
      int parts, combines;
      const int part_here = part + warp_exclusive_scan(tile.items > 1 ? tile.items : 0, parts);
      const int combine_here = combine + warp_exclusive_scan(static_cast<int>(tile.items > 1), combines);
      entry.item = __shfl_sync(0xffffffffu, item, warp);
      entry.part = __shfl_sync(0xffffffffu, part_here, warp);
      entry.combine = __shfl_sync(0xffffffffu, combine_here, warp);
      part += parts, combine += combines;
      __syncthreads();  // all have read where the next items go
      if (warp == 0 && tile.bin >= 0 && peers.before == 0) shared.cursor[tile.bin] += peers.all;
      __syncthreads();
    }
    if (entry.index < end)
      write_query_tile(table, sizes, survey, totals, entry, shared.key_tiles[warp], lists, out);
    before.all += lengthened(all), before.ends += lengthened(ends);
  }
}

}  // namespace

bool builds_together(const BlockTable& table, int q_tile) {
  const int64_t query_tiles = int64_t{table.planes} * parts_of(table.q_len, q_tile);
  return table.block % kTileKeys == 0 && table.block % q_tile == 0 && query_tiles > 0 && query_tiles <= (1 << 24) &&
         table.kv_len <= kMaxLayoutKeys;
}

int64_t together_scratch(const BlockTable& table, int q_tile) {
  const Sizes sizes(table, q_tile);
  return sizes.n * (int64_t{1} + sizes.words);
}

cudaError_t build_together(const BlockTable& table, const CellBuffers& lists, const LayoutBuffers& out,
                           const Chunking& chunking, int* scratch, cudaStream_t stream) {
  const Sizes sizes(table, out.q_tile);
  const Survey survey = survey_in(scratch, sizes);
  const cudaError_t error =
      launch_overlapping(survey_kernel, dim3{static_cast<unsigned>(parts_of(sizes.n, kSurveyWarps))}, kSurveyWarps * 32, 0,
                         stream, table, out.q_tile, survey);
  if (error != cudaSuccess) return error;
  // Every block looks at the whole survey, so there are only as many as run at once: two of four slots a multiprocessor.
  const int per_block = kWarps * parts_of(sizes.n, kWarps * max(1, chunking.slots / 2));
  return launch_overlapping(write_kernel, dim3{static_cast<unsigned>(parts_of(sizes.n, per_block))}, kThreads, 0, stream,
                            table, survey, lists, out, chunking, per_block);
}

}  // namespace stof::cuda
