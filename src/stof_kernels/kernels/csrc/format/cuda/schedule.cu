// The work list of the block-wise kernel: query tiles longest first, long ones cut into parts of about equal length. One
// block does it all: there are few query tiles, and the order must not depend on timing.
#include "layout.cuh"
#include "scan.cuh"

namespace stof::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Query tile i; past the end one without items, of no bin.
__device__ __forceinline__ Tile read_tile(const int* query_tiles, int i, int end, int chunk, int longest_item) {
  if (i >= end) return {0, 0, 0, -1};
  const int2 stored = *reinterpret_cast<const int2*>(query_tiles + static_cast<int64_t>(i) * kQueryTileInts);
  return cut_tile(stored.x, stored.y, chunk, longest_item);
}

// Every warp works on neighbouring query tiles, first to count, then, when all have counted, to place them. So equal lengths
// keep the order of the query tiles whatever the timing.
__global__ void __launch_bounds__(kThreads) schedule_kernel(CellView cells, LayoutBuffers out, Chunking chunking,
                                                            int* query_tiles) {
  __shared__ int cursor[kWarps][kBins];  // a warp's items per length, then where its next item of that length goes
  __shared__ int64_t shared[kWarps];
  __shared__ int bin_sums[kWarps + 1], longest, leading;
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
  if (bin == leading_bin(all_tiles, items, longest_item)) leading = next;
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
      for (int j = 0; j < tile.items && at + j < out.item_capacity; ++j) write_item(tile, place, at + j, part_here, j, out);
      int* to = query_tiles + static_cast<int64_t>(i) * kQueryTileInts;
      to[2] = place.first_tile, to[3] = place.first_slot, to[4] = at, to[5] = tile.items;
      if (tile.items > 1 && combine_here < out.combine_capacity)
        *reinterpret_cast<int4*>(out.combines + static_cast<int64_t>(combine_here) * kCombineInts) =
            make_int4(place.tile, part_here, tile.items, place.plane);
    }
    first_tile += tile_sum, first_slot += slot_sum, part += part_sum, combine += combine_sum;
  }
  if (threadIdx.x == 0) {
    const bool over = cells.counts[3] != 0;
    write_header(out, items, all_parts, all_combines, all_tiles, all_slots, longest_item, leading, over, cells.counts);
  }
}

}  // namespace

cudaError_t schedule_items(const CellView& cells, const LayoutBuffers& out, const Chunking& chunking, int* query_tiles,
                           cudaStream_t stream) {
  schedule_kernel<<<1, kThreads, 0, stream>>>(cells, out, chunking, query_tiles);
  return cudaGetLastError();
}

}  // namespace stof::cuda
