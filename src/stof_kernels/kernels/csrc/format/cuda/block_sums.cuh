// What build_blocks.cu knows of a table of blocks: sizes, the survey of its query tiles, and the sums over it that every block
// makes for itself.
#pragma once

#include "layout.cuh"
#include "scan.cuh"

namespace stof::cuda {

constexpr int kCell = 16, kTileKeys = 64, kRuns = kTileKeys / kCell;
constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kListWords = 32;  // of a survey, that a warp looks at together
static_assert(kThreads >= kBins, "a thread per bin");

__host__ __device__ inline int parts_of(int length, int part) { return (length + part - 1) / part; }

// What follows from the sizes alone.
struct Sizes {
  int key_tiles, words;  // along the keys, the last one cut where keys do not fill it; words of 32 of them
  int cells, ragged;     // along the keys; keys of the last cell if it is not full
  int per_plane, n;      // query tiles
  int strips;            // of a query tile
  int end_strips;        // of the one that ends a plane
  bool cut, cut_rows;    // whether the keys end inside a key tile, the queries inside a query tile

  __host__ __device__ Sizes(const BlockTable& t, int q_tile)
      : key_tiles(parts_of(t.kv_len, kTileKeys)), words(parts_of(key_tiles, 32)), cells(parts_of(t.kv_len, kCell)),
        ragged(t.kv_len % kCell), per_plane(parts_of(t.q_len, q_tile)), n(t.planes * per_plane), strips(q_tile / kCell),
        end_strips(parts_of(t.q_len, kCell) - (per_plane - 1) * strips), cut(t.kv_len % kTileKeys != 0),
        cut_rows(t.q_len % q_tile != 0) {}
};

// Of every query tile twice its number of key tiles, and one more where the cut key tile is among them; and which they are.
struct Survey {
  int* lengths;    // (n)
  uint32_t* kept;  // (n, words)
};

inline Survey survey_in(int* scratch, const Sizes& sizes) { return {scratch, reinterpret_cast<uint32_t*>(scratch + sizes.n)}; }

// Key tiles of query tiles together, and above them how many of those are cut: of up to 2**24 query tiles.
constexpr int kCutShift = 39;

__device__ __forceinline__ int64_t tally(int length) { return (length >> 1) + (static_cast<int64_t>(length & 1) << kCutShift); }
__device__ __forceinline__ int64_t tiles_in(int64_t sum) { return sum & ((int64_t{1} << kCutShift) - 1); }
__device__ __forceinline__ int64_t cuts_in(int64_t sum) { return sum >> kCutShift; }

// The same of up to 32 query tiles, in half the bits.
constexpr int kShortShift = 24;

__device__ __forceinline__ int short_tally(int length) { return (length >> 1) + ((length & 1) << kShortShift); }
__device__ __forceinline__ int64_t lengthened(int sum) {
  return (sum & ((1 << kShortShift) - 1)) + (static_cast<int64_t>(sum >> kShortShift) << kCutShift);
}

// Tallies of query tiles, and of those among them that end a plane in fewer rows.
struct Sum {
  int64_t all, ends;
};

// Listed cells, and rows of bits, of the strips of query tiles.
__device__ __forceinline__ int64_t cells_in(const Sizes& sizes, int64_t tally) {
  return kRuns * tiles_in(tally) - cuts_in(tally) * (kRuns * sizes.key_tiles - sizes.cells);
}
__device__ __forceinline__ int64_t listed_in(const Sizes& sizes, const Sum& sum) {
  return sizes.strips * cells_in(sizes, sum.all) - (sizes.strips - sizes.end_strips) * cells_in(sizes, sum.ends);
}
__device__ __forceinline__ int64_t bit_rows_in(const Sizes& sizes, const Sum& sum) {
  if (sizes.ragged == 0) return 0;
  return sizes.strips * cuts_in(sum.all) - (sizes.strips - sizes.end_strips) * cuts_in(sum.ends);
}

// What every block finds out for itself: of all query tiles, and of those before its own.
struct Totals {
  Sum all, before;
  int longest, chunk, longest_item;
  int items, parts, combines, parts_before, combines_before;
  int leading;    // items longer than twice the mean; they come first
  bool in_order;  // none is cut and all are equally long: the items are the query tiles
};

struct Shared {
  unsigned long long sums[4];
  int extremes[2], counts[4], leading;
  int cursor[kBins], all[kBins];  // items per length; the first becomes where the next of this block goes
  int scan[kWarps + 1];
  uint16_t key_tiles[kWarps][32 * kListWords];
};

__device__ __forceinline__ void add(unsigned long long* to, int64_t value) {
  const int64_t sum = warp_sum<int64_t>(value);
  if ((threadIdx.x & 31) == 0 && sum != 0) atomicAdd(to, static_cast<unsigned long long>(sum));
}
__device__ __forceinline__ void add(int* to, int value) {
  const int sum = __reduce_add_sync(0xffffffffu, value);
  if ((threadIdx.x & 31) == 0 && sum != 0) atomicAdd(to, sum);
}
__device__ __forceinline__ void raise(int* to, int value) {
  const int most = __reduce_max_sync(0xffffffffu, value);
  if ((threadIdx.x & 31) == 0) atomicMax(to, most);
}
__device__ __forceinline__ void count_items(int* bins, const Tile& tile, const Peers& peers) {
  if (tile.bin >= 0 && peers.before == 0) atomicAdd(bins + tile.bin, peers.all);
}

__device__ __forceinline__ bool ends_plane(const Sizes& sizes, int i) {
  return sizes.cut_rows && (i + 1) % sizes.per_plane == 0;
}

// Query tile i as its items; without, and of no bin, where it is not one of them.
__device__ __forceinline__ Tile tile_at(int length, bool exists, int chunk, int longest_item) {
  if (!exists) return {0, 0, 0, -1};
  return cut_tile(length >> 1, (length >> 1) - (length & 1), chunk, longest_item);
}

inline __device__ Totals totals_of(const Sizes& sizes, const Survey& survey, const Chunking& chunking, int first,
                                   Shared& shared) {
  if (threadIdx.x < 4) shared.sums[threadIdx.x] = 0, shared.counts[threadIdx.x] = 0;
  if (threadIdx.x < 2) shared.extremes[threadIdx.x] = threadIdx.x == 0 ? 0 : -0x7fffffff;
  __syncthreads();
  Totals totals{};
  int longest = 0, minus_shortest = -0x7fffffff;
#pragma unroll 4
  for (int i = threadIdx.x; i < sizes.n; i += kThreads) {
    const int length = survey.lengths[i];
    const int64_t mine = tally(length), at_end = ends_plane(sizes, i) ? mine : 0;
    totals.all.all += mine, totals.all.ends += at_end;
    if (i < first) totals.before.all += mine, totals.before.ends += at_end;
    longest = max(longest, length >> 1), minus_shortest = max(minus_shortest, -(length >> 1));
  }
  add(shared.sums, totals.all.all), add(shared.sums + 1, totals.before.all);
  if (sizes.cut_rows) add(shared.sums + 2, totals.all.ends), add(shared.sums + 3, totals.before.ends);
  raise(shared.extremes, longest), raise(shared.extremes + 1, minus_shortest);
  __syncthreads();
  totals.all = {static_cast<int64_t>(shared.sums[0]), static_cast<int64_t>(shared.sums[2])};
  totals.before = {static_cast<int64_t>(shared.sums[1]), static_cast<int64_t>(shared.sums[3])};
  totals.longest = shared.extremes[0];
  totals.chunk = chunk_of(chunking, tiles_in(totals.all.all), sizes.n);
  totals.longest_item = min(totals.longest, totals.chunk);
  totals.items = sizes.n;
  totals.in_order = totals.longest == -shared.extremes[1] && totals.longest <= totals.chunk;
  return totals;
}

// The order where lists differ or are cut: how many items are longer than this block's, or as long and before them.
inline __device__ void order_items(const Sizes& sizes, const Survey& survey, int first, Totals& totals, Shared& shared) {
  const int lane = threadIdx.x & 31;
  shared.cursor[threadIdx.x] = shared.all[threadIdx.x] = 0;
  __syncthreads();
  int counts[4] = {};  // parts and combines, of all and of those before
  for (int base = static_cast<int>(threadIdx.x) - lane; base < sizes.n; base += kThreads) {
    const int i = base + lane;
    Tile tile = tile_at(i < sizes.n ? survey.lengths[i] : 0, i < sizes.n, totals.chunk, totals.longest_item);
    const int parts = tile.items > 1 ? tile.items : 0;
    counts[0] += parts, counts[1] += parts > 0;
    if (i < first) counts[2] += parts, counts[3] += parts > 0;
    const Peers peers = peers_of(tile);
    count_items(shared.all, tile, peers);
    if (base + 32 <= first) {
      count_items(shared.cursor, tile, peers);
    } else if (base < first) {
      if (i >= first) tile = {0, 0, 0, -1};
      count_items(shared.cursor, tile, peers_of(tile));
    }
  }
  for (int k = 0; k < 4; ++k) add(shared.counts + k, counts[k]);
  __syncthreads();
  totals.parts = shared.counts[0], totals.combines = shared.counts[1];
  totals.parts_before = shared.counts[2], totals.combines_before = shared.counts[3];
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);  // longest first
  const int longer = block_exclusive_scan(bin >= 0 ? shared.all[bin] : 0, shared.scan, totals.items);
  if (bin >= 0) shared.cursor[bin] += longer;
  if (bin == leading_bin(tiles_in(totals.all.all), totals.items, totals.longest_item)) shared.leading = longer;
  __syncthreads();
  totals.leading = shared.leading;
}

}  // namespace stof::cuda
