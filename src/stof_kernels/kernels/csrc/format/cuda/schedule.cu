// The work list of the block-wise kernel: query tiles longest first, long ones cut into parts of about equal length. One
// block does it all: there are few query tiles, and the order must not depend on timing.
#include "attention/cuda/problem.h"
#include "format.h"
#include "scan.cuh"

namespace stof::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 512;  // lengths told apart by the order
// Key tiles under which a cut costs more than it brings: each part is written and read. Where one block a multiprocessor
// is all there is, the split shape deals a longer list among its warps without writing anything.
constexpr int kMinChunk = 8, kMinChunkSplit = 16;

struct Tile {
  int length, full, items, bin;
};

// The chunk at which the lists are cut.
__device__ __forceinline__ int chunk_of(const Chunking& chunking, int64_t total, int n) {
  if (chunking.chunk > 0) return chunking.chunk;
  if (chunking.chunk == 0) return 0x3fffffff;
  // Half more than a block's fair share: the longest start first, and what runs on alone at the end runs faster.
  const int64_t share = (3 * total * chunking.copies + 2 * chunking.slots - 1) / max(2 * chunking.slots, 1);
  const bool few = 8 * static_cast<int64_t>(n) * chunking.copies <= 3 * static_cast<int64_t>(chunking.slots);
  const int64_t least = few ? kMinChunkSplit : kMinChunk;
  return static_cast<int>(min(max(share, least), static_cast<int64_t>(0x3fffffff)));
}

// Query tile i; past the end one without items, of no bin.
__device__ __forceinline__ Tile read_tile(const int* query_tiles, int i, int end, int chunk, int longest_item) {
  if (i >= end) return {0, 0, 0, -1};
  const int2 stored = *reinterpret_cast<const int2*>(query_tiles + static_cast<int64_t>(i) * kQueryTileInts);
  Tile tile{stored.x, stored.y, max(1, (stored.x + chunk - 1) / chunk), 0};
  const int item_length = (tile.length + tile.items - 1) / tile.items;
  tile.bin = longest_item < kBins ? item_length : static_cast<int>(int64_t{item_length} * (kBins - 1) / longest_item);
  return tile;
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

__device__ void write_items(const Tile& tile, const Place& place, int at, int part, const LayoutBuffers& out) {
  const int base = tile.length / tile.items, more = tile.length % tile.items;
  for (int j = 0; j < tile.items && at + j < out.item_capacity; ++j) {
    const int begin = j * base + min(j, more), count = base + (j < more);
    int4* item = reinterpret_cast<int4*>(out.items + static_cast<int64_t>(at + j) * kItemInts);
    item[0] = make_int4(place.tile, place.first_tile + begin, count, tile.items > 1 ? part + j : -1);
    item[1] = make_int4(min(max(tile.full - begin, 0), count), place.first_slot + max(begin - tile.full, 0), place.plane, 0);
  }
}

// Every warp works on neighbouring query tiles, first to count, then, when all have counted, to place them. So equal lengths
// keep the order of the query tiles whatever the timing.
__global__ void __launch_bounds__(kThreads) schedule_kernel(CellView cells, LayoutBuffers out, Chunking chunking,
                                                            int* query_tiles) {
  __shared__ int cursor[kWarps][kBins];  // a warp's items per length, then where its next item of that length goes
  __shared__ int64_t shared[kWarps];
  __shared__ int bin_sums[kWarps + 1], longest;
  const int per_plane = (cells.q_len + out.q_tile - 1) / out.q_tile, n = cells.planes * per_plane;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Range mine = warp_range(n);
  if (threadIdx.x == 0) longest = 0;
  for (int b = lane; b < kBins; b += 32) cursor[warp][b] = 0;
  __syncthreads();

  int64_t tiles = 0, slots = 0;
  int top = 0;
#pragma unroll 4
  for (int i = mine.begin + lane; i < mine.end; i += 32) {
    const int2 stored = *reinterpret_cast<const int2*>(query_tiles + static_cast<int64_t>(i) * kQueryTileInts);
    tiles += stored.x, slots += stored.x - stored.y;
    top = max(top, stored.x);
  }
  atomicMax(&longest, top);
  int64_t all_tiles, all_slots;
  int64_t first_tile = before_warp<int64_t>(warp_sum(tiles), shared, all_tiles);
  int64_t first_slot = before_warp<int64_t>(warp_sum(slots), shared, all_slots);
  const int chunk = chunk_of(chunking, all_tiles, n), longest_item = min(longest, chunk);

  int parts = 0, combines = 0;
#pragma unroll 4
  for (int i = mine.begin + lane; i < mine.end; i += 32) {
    const Tile tile = read_tile(query_tiles, i, mine.end, chunk, longest_item);
    atomicAdd(&cursor[warp][tile.bin], tile.items);
    parts += tile.items > 1 ? tile.items : 0;
    combines += tile.items > 1;
  }
  int all_parts, all_combines;
  int part = before_warp(warp_sum(parts), bin_sums, all_parts);  // its barriers also end the counting
  int combine = before_warp(warp_sum(combines), bin_sums, all_combines);
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);  // longest first
  int in_bin = 0, items;
  for (int w = 0; w < kWarps && bin >= 0; ++w) in_bin += cursor[w][bin];
  int next = block_exclusive_scan(in_bin, bin_sums, items);
  for (int w = 0; w < kWarps && bin >= 0; ++w) {
    const int count = cursor[w][bin];
    cursor[w][bin] = next;
    next += count;
  }
  __syncthreads();

  for (int base = mine.begin; base < mine.end; base += 32) {
    const int i = base + lane;
    const Tile tile = read_tile(query_tiles, i, mine.end, chunk, longest_item);
    int tile_sum, slot_sum, part_sum, combine_sum;
    const int64_t most = 0x7fffffff;  // far over any capacity
    const int64_t tile_here = first_tile + warp_exclusive_scan(tile.length, tile_sum);
    const int64_t slot_here = first_slot + warp_exclusive_scan(tile.length - tile.full, slot_sum);
    const int part_here = part + warp_exclusive_scan(tile.items > 1 ? tile.items : 0, part_sum);
    const int combine_here = combine + warp_exclusive_scan(static_cast<int>(tile.items > 1), combine_sum);
    const Peers peers = peers_of(tile);
    const int at = tile.bin >= 0 ? cursor[warp][tile.bin] + peers.before : 0;
    __syncwarp();
    if (tile.bin >= 0 && peers.before == 0) cursor[warp][tile.bin] += peers.all;  // the first lane of its length
    __syncwarp();
    if (tile.bin >= 0) {
      const Place place{i / per_plane, i % per_plane, static_cast<int>(min(tile_here, most)),
                        static_cast<int>(min(slot_here, most))};
      write_items(tile, place, at, part_here, out);
      int* to = query_tiles + static_cast<int64_t>(i) * kQueryTileInts;
      to[2] = place.first_tile, to[3] = place.first_slot, to[4] = at, to[5] = tile.items;
      if (tile.items > 1 && combine_here < out.combine_capacity)
        *reinterpret_cast<int4*>(out.combines + static_cast<int64_t>(combine_here) * kCombineInts) =
            make_int4(place.tile, part_here, tile.items, place.plane);
    }
    first_tile += tile_sum, first_slot += slot_sum, part += part_sum, combine += combine_sum;
  }
  if (threadIdx.x == 0) {
    const bool measuring = out.item_capacity == 0;
    const bool over = cells.counts[3] != 0 ||
                      (!measuring && (all_tiles > out.tile_capacity || all_slots > out.slot_capacity ||
                                      items > out.item_capacity || all_combines > out.combine_capacity));
    const int64_t most = 0x7fffffff;
    const int values[kHeaderInts] = {items, all_parts, all_combines, static_cast<int>(min(all_tiles, most)),
                                     static_cast<int>(min(all_slots, most)), longest_item, over, 0};
    for (int k = 0; k < kHeaderInts; ++k) out.header[k] = values[k];
    if (over) cells.counts[3] = 1;  // so that every kernel and SparseMask.check say so
  }
}

}  // namespace

cudaError_t schedule_items(const CellView& cells, const LayoutBuffers& out, const Chunking& chunking, int* query_tiles,
                           cudaStream_t stream) {
  schedule_kernel<<<1, kThreads, 0, stream>>>(cells, out, chunking, query_tiles);
  return cudaGetLastError();
}

}  // namespace stof::cuda
