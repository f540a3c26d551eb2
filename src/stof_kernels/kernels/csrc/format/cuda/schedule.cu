// The work list of the block-wise kernel: query tiles longest first, long ones cut into parts of about equal length. One
// block does it all: there are few query tiles, and the order must not depend on timing.
#include "attention/cuda/problem.h"
#include "format.h"
#include "scan.cuh"

namespace stof::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1024;    // lengths told apart by the order
// Key tiles under which a cut costs more than it brings: each part is written and read. Where one block a multiprocessor
// is all there is, the split shape deals a longer list among its warps without writing anything.
constexpr int kMinChunk = 8, kMinChunkSplit = 16;

struct Tile {
  int length, full, first_tile, first_slot;
  int items, bin;
};

__device__ __forceinline__ int pieces(int length, int chunk) { return max(1, (length + chunk - 1) / chunk); }

// First pass: where each query tile's key tiles and bitmaps start; returns the totals and the longest list.
__device__ void place_tiles(int n, int* query_tiles, int64_t& total, int64_t& slots, int& longest) {
  __shared__ int64_t shared[kThreads / 32 + 1];
  __shared__ int top;
  if (threadIdx.x == 0) top = 0;
  __syncthreads();
  total = slots = 0;
  for (int base = 0; base < n; base += kThreads) {
    const int i = base + threadIdx.x;
    int* mine = query_tiles + static_cast<int64_t>(i) * kQueryTileInts;
    const int length = i < n ? mine[0] : 0, full = i < n ? mine[1] : 0;
    int64_t length_sum, slot_sum;
    const int64_t tile = total + block_exclusive_scan<int64_t>(length, shared, length_sum);
    const int64_t slot = slots + block_exclusive_scan<int64_t>(length - full, shared, slot_sum);
    const int64_t most = 0x7fffffff;  // far over any capacity
    if (i < n) mine[2] = static_cast<int>(min(tile, most)), mine[3] = static_cast<int>(min(slot, most));
    total += length_sum;
    slots += slot_sum;
    atomicMax(&top, length);
  }
  __syncthreads();
  longest = top;
}

__device__ __forceinline__ Tile read_tile(const int* query_tiles, int i, int chunk, int longest_item) {
  const int4 stored = *reinterpret_cast<const int4*>(query_tiles + static_cast<int64_t>(i) * kQueryTileInts);
  Tile tile{stored.x, stored.y, stored.z, stored.w, pieces(stored.x, chunk), 0};
  const int item_length = (tile.length + tile.items - 1) / tile.items;
  tile.bin = longest_item < kBins ? item_length : static_cast<int>(int64_t{item_length} * (kBins - 1) / longest_item);
  return tile;
}

// Query tile `index` of all planes as its plane and its place there.
struct Place {
  int plane, tile;
};

__device__ void write_items(const Tile& tile, const Place& place, int at, int part, const LayoutBuffers& out) {
  const int base = tile.length / tile.items, more = tile.length % tile.items;
  for (int j = 0; j < tile.items && at + j < out.item_capacity; ++j) {
    const int begin = j * base + min(j, more), count = base + (j < more);
    int* item = out.items + static_cast<int64_t>(at + j) * kItemInts;
    item[0] = place.tile;
    item[1] = tile.first_tile + begin;
    item[2] = count;
    item[3] = tile.items > 1 ? part + j : -1;
    item[4] = min(max(tile.full - begin, 0), count);
    item[5] = tile.first_slot + max(begin - tile.full, 0);
    item[6] = place.plane;
    item[7] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) schedule_kernel(CellView cells, LayoutBuffers out, Chunking chunking,
                                                            int* query_tiles) {
  __shared__ int shared[kThreads / 32 + 1];
  __shared__ int cursor[kBins];  // items per length, then where the next item of that length goes
  const int per_plane = (cells.q_len + out.q_tile - 1) / out.q_tile, n = cells.planes * per_plane;
  int64_t total, slots;
  int longest;
  place_tiles(n, query_tiles, total, slots, longest);
  int chunk = chunking.chunk;
  if (chunk < 0) {
    // Half more than a block's fair share: the longest start first, and what runs on alone at the end runs faster.
    const int64_t share = (3 * total * chunking.copies + 2 * chunking.slots - 1) / max(2 * chunking.slots, 1);
    const bool few = 8 * static_cast<int64_t>(n) * chunking.copies <= 3 * static_cast<int64_t>(chunking.slots);
    const int64_t least = few ? kMinChunkSplit : kMinChunk;
    chunk = static_cast<int>(min(max(share, least), static_cast<int64_t>(0x3fffffff)));
  } else if (chunk == 0) {
    chunk = 0x3fffffff;
  }
  const int longest_item = min(longest, chunk);

  cursor[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Tile tile = read_tile(query_tiles, i, chunk, longest_item);
    atomicAdd(cursor + tile.bin, tile.items);
  }
  __syncthreads();
  const int bin = kBins - 1 - threadIdx.x;  // longest first
  int items;
  const int start = block_exclusive_scan(cursor[bin], shared, items);
  cursor[bin] = start;
  __syncthreads();

  int parts = 0, combines = 0;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int base = 0; base < n; base += kThreads) {
    const int i = base + threadIdx.x;
    Tile tile{0, 0, 0, 0, 0, -1};
    if (i < n) tile = read_tile(query_tiles, i, chunk, longest_item);
    int part_sum, combine_sum;
    const int part = parts + block_exclusive_scan(tile.items > 1 ? tile.items : 0, shared, part_sum);
    const int combine = combines + block_exclusive_scan(static_cast<int>(tile.items > 1), shared, combine_sum);
    // Warp after warp, so that equal lengths keep the order of the query tiles whatever the timing.
    int before = 0, same = 0, at = 0;
    for (int other = 0; other < 32; ++other) {
      const int other_bin = __shfl_sync(0xffffffffu, tile.bin, other);
      const int other_items = __shfl_sync(0xffffffffu, tile.items, other);
      if (other_bin != tile.bin) continue;
      if (other < lane) before += other_items;
      same += other_items;
    }
    const int warps = min((n - base + 31) / 32, kThreads / 32);
    for (int turn = 0; turn < warps; ++turn) {
      if (warp == turn) {
        if (i < n) at = cursor[tile.bin] + before;
        __syncwarp();
        if (i < n && before == 0) cursor[tile.bin] += same;  // the first lane of its length
      }
      __syncthreads();
    }
    if (i < n) {
      const Place place{i / per_plane, i % per_plane};
      write_items(tile, place, at, part, out);
      int* mine = query_tiles + static_cast<int64_t>(i) * kQueryTileInts;
      mine[4] = at;
      mine[5] = tile.items;
      if (tile.items > 1 && combine < out.combine_capacity)
        *reinterpret_cast<int4*>(out.combines + static_cast<int64_t>(combine) * kCombineInts) =
            make_int4(place.tile, part, tile.items, place.plane);
    }
    parts += part_sum;
    combines += combine_sum;
  }
  if (threadIdx.x == 0) {
    const bool measuring = out.item_capacity == 0;
    const bool over = cells.counts[3] != 0 || (!measuring && (total > out.tile_capacity || slots > out.slot_capacity ||
                                                              items > out.item_capacity || combines > out.combine_capacity));
    const int values[kHeaderInts] = {items, parts, combines, static_cast<int>(min(total, int64_t{0x7fffffff})),
                                     static_cast<int>(min(slots, int64_t{0x7fffffff})), longest_item, over, 0};
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
