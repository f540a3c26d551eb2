// What both builders of the block-wise layout share: how lists are cut, what a work item says, the order of a bitmap's bits.
#pragma once

#include "attention/cuda/problem.h"
#include "format.h"

namespace stof::cuda {

constexpr int kBins = 512;  // lengths told apart by the order
// Key tiles under which a cut costs more than it brings: each part is written and read. Where one block a multiprocessor
// is all there is, the split shape deals a longer list among its warps without writing anything.
constexpr int kMinChunk = 8, kMinChunkSplit = 16;

// A query tile's list: its key tiles, how many of them lead and are full, the items it is cut into, its place in the order.
struct Tile {
  int length, full, items, bin;
};

// The chunk at which the lists of n query tiles, `total` key tiles together, are cut.
__device__ __forceinline__ int chunk_of(const Chunking& chunking, int64_t total, int n) {
  if (chunking.chunk > 0) return chunking.chunk;
  if (chunking.chunk == 0) return 0x3fffffff;
  // Half more than a block's fair share: the longest start first, and what runs on alone at the end runs faster.
  const int64_t share = (3 * total * chunking.copies + 2 * chunking.slots - 1) / max(2 * chunking.slots, 1);
  const bool few = 8 * static_cast<int64_t>(n) * chunking.copies <= 3 * static_cast<int64_t>(chunking.slots);
  const int64_t least = few ? kMinChunkSplit : kMinChunk;
  return static_cast<int>(min(max(share, least), static_cast<int64_t>(0x3fffffff)));
}

__device__ __forceinline__ Tile cut_tile(int length, int full, int chunk, int longest_item) {
  Tile tile{length, full, max(1, (length + chunk - 1) / chunk), 0};
  const int item_length = (length + tile.items - 1) / tile.items;
  tile.bin = longest_item < kBins ? item_length : static_cast<int>(int64_t{item_length} * (kBins - 1) / longest_item);
  return tile;
}

// Items of later places than this in the order are longer than twice the mean. They lead: blocks that stay take them for all
// copies of the mask before the rest, which goes copies by copies, for what starts so late would end after everything else.
__device__ __forceinline__ int leading_bin(int64_t tiles, int items, int longest_item) {
  const int64_t most = 2 * tiles / max(items, 1);
  if (most >= longest_item) return kBins - 1;
  return static_cast<int>(longest_item < kBins ? most : most * (kBins - 1) / longest_item);
}

// Items of lanes with the same length: those of lower lanes, and all.
struct Peers {
  int before, all;
};

__device__ __forceinline__ Peers peers_of(const Tile& tile) {
  const int lane = threadIdx.x & 31;
  const uint32_t same = __match_any_sync(0xffffffffu, tile.bin);
  if (__all_sync(0xffffffffu, tile.items <= 1)) return {__popc(same & ((1u << lane) - 1)), __popc(same)};
  Peers peers{0, 0};
  for (int other = 0; other < 32; ++other) {
    const int items = __shfl_sync(0xffffffffu, tile.items, other);
    if ((same >> other & 1) == 0) continue;
    if (other < lane) peers.before += items;
    peers.all += items;
  }
  return peers;
}

// Where a query tile lies: its plane and its place there, its first key tile and bitmap.
struct Place {
  int plane, tile, first_tile, first_slot;
};

// Which of a list's key tiles item j begins with.
__device__ __forceinline__ int item_begin(const Tile& tile, int j) {
  return j * (tile.length / tile.items) + min(j, tile.length % tile.items);
}

// Item j of a query tile as entry `at`, but for the first key tile's runs.
__device__ __forceinline__ void write_item(const Tile& tile, const Place& place, int at, int part, int j,
                                           const LayoutBuffers& out) {
  const int begin = item_begin(tile, j), count = item_begin(tile, j + 1) - begin;
  int4* item = reinterpret_cast<int4*>(out.items + static_cast<int64_t>(at) * kItemInts);
  item[0] = make_int4(place.tile, place.first_tile + begin, count, tile.items > 1 ? part + j : -1);
  item[1] = make_int4(min(max(tile.full - begin, 0), count), place.first_slot + max(begin - tile.full, 0), place.plane, 0);
}

// A lane's byte of a bitmap word: rows g and g + 8, columns 2 t, 2 t + 1 and the same 8 further, of one cell.
__device__ __forceinline__ uint32_t accumulator_byte(uint32_t upper, uint32_t lower, int lane) {
  const int shift = 2 * (lane & 3);
  upper >>= shift;
  lower >>= shift;
  return (upper & 3) | (lower & 3) << 2 | (upper >> 8 & 3) << 4 | (lower >> 8 & 3) << 6;
}

// By one thread: what the header says of items, parts, combines, key tiles, bitmaps and leading items, and whether all of it
// fits. `over`: already known not to. With room for no item, sizes are only measured.
__device__ __forceinline__ void write_header(const LayoutBuffers& out, int items, int parts, int combines, int64_t tiles,
                                             int64_t slots, int longest_item, int leading, bool over, int64_t* counts) {
  const bool measuring = out.item_capacity == 0;
  over = over || (!measuring && (tiles > out.tile_capacity || slots > out.slot_capacity || items > out.item_capacity ||
                                 combines > out.combine_capacity));
  const int64_t most = 0x7fffffff;
  const int values[kHeaderInts] = {items, parts, combines, static_cast<int>(min(tiles, most)),
                                   static_cast<int>(min(slots, most)), longest_item, over, leading};
  for (int k = 0; k < kHeaderInts; ++k) out.header[k] = values[k];
  if (over) counts[3] = 1;  // so that every kernel and SparseMask.check say so
}

}  // namespace stof::cuda
