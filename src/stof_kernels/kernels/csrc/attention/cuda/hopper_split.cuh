// Block-wise attention on Hopper for short calls: the key tiles of one work item are dealt to the warpgroups of a block, each
// of which brings its own by bulk tensor copies, and the partial results are merged in shared memory, in a fixed order.
//
// There is no producer: the first thread of a warpgroup's first warp copies keys, that of the second values, and one of the
// block's queries. Whatever needs no tensor of the call (lists, barriers, tensor maps) is done before the call before this
// one has ended, where the layout allows it.
#pragma once

#include "hopper_config.cuh"
#include "hopper_rows.cuh"
#include "launch.h"

namespace stof::cuda {

template <typename T_, int kDim_, int kGroups_, int kStages_>
struct HopperSplitConfig {
  using T = T_;
  static constexpr int kDim = kDim_;        // head dim, padded: 64 or 128
  static constexpr int kGroups = kGroups_;  // warpgroups, which share the key tiles of an item
  static constexpr int kStages = kStages_;  // key tiles that a warpgroup holds

  static constexpr int kThreads = kGroups * 128;
  static constexpr int kRows = 64;  // query tile
  static constexpr int kKeys = 64;  // key tile
  static constexpr int kRun = 16;
  static constexpr int kBlocks = kDim / 64;        // blocks of 64 dims, whose rows of 128 bytes are swizzled
  static constexpr int kBlockBytes = kKeys * 128;
  static constexpr int kQueryBlockBytes = kBlockBytes;
  static constexpr int kTileBytes = kBlocks * kBlockBytes;  // queries, keys or values
  static constexpr int kWordBytes = kRows * 8;              // bitmap of one tile
  static constexpr int kColumns = 64;                       // of a warpgroup's tiles: their runs wait in shared memory
  // Results are merged in pieces of 32 dims of one of the two rows of each thread.
  static constexpr int kPieces = kDim / 16;
  static constexpr int kMostPieces = (kPieces + kGroups - 1) / kGroups;  // that a warpgroup joins and writes
  static constexpr int kPieceBytes = 8 * 128 * 4;
  static constexpr int kStatBytes = 128 * 16;

  // A warpgroup's shared memory: its slots first, keys and values of a stage side by side.
  static constexpr int kWordsAt = kStages * 2 * kTileBytes;
  static constexpr int kColumnsAt = kWordsAt + kStages * kWordBytes;
  static constexpr int kBarriersAt = kColumnsAt + kColumns * 16;
  static constexpr int kGroupBytes = (kBarriersAt + kStages * 4 * 8 + 8 + 1023) / 1024 * 1024;
  // A block's: its warpgroups', queries, what the item's warpgroups hand over to them, the item.
  static constexpr int kQueriesAt = kGroups * kGroupBytes;
  static constexpr int kPiecesAt = kQueriesAt + kTileBytes;
  static constexpr int kStatsAt = kPiecesAt + kGroups * kMostPieces * (kGroups - 1) * kPieceBytes;
  static constexpr int kItemAt = kStatsAt + kGroups * kStatBytes;
  static constexpr int kSharedBytes = kItemAt + 64 + 1024;  // the last to align the first
  static_assert(kSharedBytes <= 227 * 1024, "shared memory");
};

template <class C>
class HopperSplit {
  using T = typename C::T;
  using Scores = typename HopperRows<C>::Scores;

 public:
  __device__ HopperSplit(const Problem& p, const BlockLayout& layout, const HopperMaps& maps, uint32_t memory)
      : p(p), layout(layout), maps(maps), memory(memory), own_memory(memory + own_group() * C::kGroupBytes),
        warp((threadIdx.x >> 5) & 3), lane(threadIdx.x & 31), rows(p, warp) {}

  // What needs nothing that an earlier kernel writes, but the layout.
  __device__ void prepare(const Assignment& mine) {
    const int4* item = reinterpret_cast<const int4*>(layout.items + static_cast<int64_t>(mine.item) * kItemInts);
    const int4 head = __ldg(item), more = __ldg(item + 1);
    const int group = own_group();
    own = own_of(head.z, group);
    const int thread = warp * 32 + lane;
    if (thread < C::kColumns && thread < own) put_shared(columns() + thread * 16, column(head.y + group, thread));
    if (threadIdx.x == 64) {
      const Instance at = instance_of(p, more.z, mine.copy);
      put_shared(item_at(), make_int4(head.x * C::kRows, at.batch, at.head, at.kv_head));
      put_shared(item_at() + 16, make_int4(head.y, more.y - more.x, head.w, mine.copy));
      asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(tiles_at()), "r"(head.z) : "memory");
      barrier_init(query_full(), 1);
    }
    if (thread == 96) {
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(dealt_at()), "r"(own_of(more.x, group)), "r"(group) : "memory");
      for (int s = 0; s < C::kStages; ++s) {
        barrier_init(full(s, 0), 1), barrier_init(full(s, 1), 1);
        barrier_init(empty(s, 0), 4), barrier_init(empty(s, 1), 4);
      }
    }
    if (thread >= 64) barrier_init_fence();
    if (thread < 5) prefetch_map(&maps.q + thread);
    __syncthreads();
  }

  // The first copies, all at once, as soon as what earlier kernels wrote can be read. A block without a tile copies nothing, for
  // it would not wait for it.
  __device__ void start() {
    const Source first = source(0);
    const bool brings = lane == 0 && warp < 2, brings_queries = threadIdx.x == 64 && own > 0;
    if (brings) {
      for (int i = 0; i < C::kStages && i < own; ++i) announce(i, warp);
    } else if (brings_queries) {
      barrier_expect(query_full(), C::kTileBytes);
    }
    wait_for_predecessor();
    if (brings) {
      if (own > 0) bring(first, 0, warp);
      for (int i = 1; i < C::kStages && i < own; ++i) bring(source(i), i, warp);
    } else if (brings_queries) {
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b)
        copy_box(memory + C::kQueriesAt + b * C::kBlockBytes, &maps.q, query_full(), b * 64, first.place.x, first.place.z,
                 first.place.y);
    }
    __syncwarp();
  }

  // Every tile of this warpgroup. While a tile's scores become probabilities, the product of the last one's with its values
  // runs.
  __device__ void work() {
    rows.start();
    if (own == 0) {
      rows.zero_output();
      rows.finish();
      return;
    }
    barrier_wait(query_full(), 0);
    rows.load_queries(memory + C::kQueriesAt);
    barrier_wait(full(0, 0), 0);
    rows.first_tile(slot(0, 0), is_partial(0), words(0));
    release(0, 0);
#pragma unroll 1
    for (int i = 1; i < own; ++i) {
      const bool partial = is_partial(i);
      barrier_wait(full(i, 0), parity(i));
      Scores s;
      rows.start_scores(s, slot(i, 0));
      barrier_wait(full(i - 1, 1), parity(i - 1));
      rows.start_output(slot(i - 1, 1), i == 1);
      products_wait<1>();
      pin_registers(s);
      if (partial) rows.mask_scores(s, words(i));
      if (rows.softmax(s)) {
        pin_registers(s);
        products_wait<0>();
        pin_registers(rows.o);
        rows.pack(s);
      } else {
        products_wait<0>();
        pin_registers(rows.o);
        rows.repeat_tile(slot(i, 0), partial, words(i));
      }
      release(i, 0);
      release(i - 1, 1);
    }
    barrier_wait(full(own - 1, 1), parity(own - 1));
    rows.start_output(slot(own - 1, 1), own == 1);
    rows.finish();
    products_wait<0>();
    pin_registers(rows.o);
  }

  // Joins what the warpgroups have and writes it: each joins and writes its pieces.
  __device__ void finish() {
    int tiles;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(tiles) : "r"(tiles_at()) : "memory");
    if (tiles > 1) {
      merge(tiles);
    } else if (own_group() == 0) {
      write(get_shared(item_at()), get_shared(item_at() + 16), HopperAllPieces{});
    }
  }

 private:
  const Problem& p;
  const BlockLayout& layout;
  const HopperMaps& maps;
  const uint32_t memory, own_memory;  // of the block, of the warpgroup
  const int warp, lane;
  HopperRows<C> rows;
  int own;  // tiles of this warpgroup: of the item's the one with its number, and every kGroups on

  // Its number. Read anew where it is needed: the loop has no register to keep it in. Of whole warps.
  static __device__ int own_group() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return __shfl_sync(0xffffffffu, thread >> 7, 0);
  }

  static __device__ void put_shared(uint32_t address, const int4& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
  }
  static __device__ int4 get_shared(uint32_t address) {
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
  }

  // Of this warpgroup's tile `i`.
  static __device__ int stage(int i) { return static_cast<unsigned>(i) % C::kStages; }
  static __device__ uint32_t parity(int i) { return static_cast<unsigned>(i) / C::kStages & 1; }
  __device__ uint32_t slot(int i, int is_value) const { return own_memory + (stage(i) * 2 + is_value) * C::kTileBytes; }
  __device__ uint32_t words(int i) const { return own_memory + C::kWordsAt + stage(i) * C::kWordBytes; }
  __device__ uint32_t full(int i, int is_value) const { return own_memory + C::kBarriersAt + (stage(i) * 2 + is_value) * 16; }
  __device__ uint32_t empty(int i, int is_value) const { return full(i, is_value) + 8; }
  __device__ uint32_t columns() const { return own_memory + C::kColumnsAt; }
  // Of the item, where nobody needs registers for it: {first row, batch, head, head of keys}, {first key tile, what a tile's
  // number is added to for its bitmap, part or -1, copy}.
  __device__ uint32_t item_at() const { return memory + C::kItemAt; }
  __device__ uint32_t tiles_at() const { return memory + C::kItemAt + 32; }
  __device__ uint32_t query_full() const { return memory + C::kItemAt + 40; }

  // Of this warpgroup: how many of its tiles are full, which come first, and its number.
  __device__ uint32_t dealt_at() const { return own_memory + C::kBarriersAt + C::kStages * 32; }
  __device__ int2 dealt() const {
    int2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x.x), "=r"(x.y) : "r"(dealt_at()) : "memory");
    return x;
  }
  // Whether its tile `i` has a bitmap.
  __device__ bool is_partial(int i) const { return i >= dealt().x; }

  // How many of the item's first `n` tiles are that warpgroup's.
  static __device__ int own_of(int n, int group) { return n > group ? (n - group - 1) / C::kGroups + 1 : 0; }

  // Runs of its tile `i`; `first`: where its first tile is among all.
  __device__ int4 column(int first, int i) const {
    return __ldg(reinterpret_cast<const int4*>(layout.col) + first + i * C::kGroups);
  }

  // What is copied for this warpgroup's tile `i`: what the block knows of the item (see item_at), and the tile's runs.
  struct Source {
    int4 place, more, runs;
  };
  __device__ Source source(int i) const {
    Source from{get_shared(item_at()), get_shared(item_at() + 16), {}};
    from.runs = i < C::kColumns ? get_shared(columns() + i * 16) : column(from.more.x + dealt().y, i);
    return from;
  }

  // Tells the barrier of keys or values of tile `i` what comes.
  __device__ void announce(int i, int is_value) const {
    const bool bitmap = is_value == 0 && is_partial(i);
    barrier_expect(full(i, is_value), C::kTileBytes + (bitmap ? C::kWordBytes : 0));
  }

  // Keys or values of tile `i` of this warpgroup. An absent run reads past the last row: zeros.
  __device__ void bring(const Source& from, int i, int is_value) const {
    const int4 place = from.place;
    const int run[4] = {from.runs.x, from.runs.y, from.runs.z, from.runs.w};
    const uint32_t barrier = full(i, is_value), dst = slot(i, is_value);
    if (run[0] >= 0 && run[1] == run[0] + 1 && run[2] == run[0] + 2 && run[3] == run[0] + 3) {
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b)
        copy_box(dst + b * C::kBlockBytes, is_value ? &maps.v_tile : &maps.k_tile, barrier, b * 64, run[0] * C::kRun,
                 place.w, place.y);
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = run[r] < 0 ? p.kv_len : run[r] * C::kRun;
#pragma unroll
        for (int b = 0; b < C::kBlocks; ++b)
          copy_box(dst + b * C::kBlockBytes + r * C::kRun * 128, is_value ? &maps.v_run : &maps.k_run, barrier, b * 64, row,
                   place.w, place.y);
      }
    }
    const int2 mine = dealt();
    if (is_value == 0 && i >= mine.x) {
      const int64_t bits = from.more.y + mine.y + i * C::kGroups;
      copy_bytes(words(i), layout.bits + bits * (C::kWordBytes / 4), C::kWordBytes, barrier);
    }
  }

  // This warp is done with tile `i` of keys or values; the warp that brings them puts another in their place once all are.
  __device__ void release(int i, int is_value) const {
    if (i + C::kStages >= own) return;
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(empty(i, is_value));
      if (warp == is_value) {
        const int next = i + C::kStages;
        barrier_wait(empty(i, is_value), parity(next) ^ 1);  // parity(i), which would wait in a register since the loop began
        announce(next, is_value);
        bring(source(next), next, is_value);
      }
    }
    __syncwarp();
  }

  // ---- merge ------------------------------------------------------------------------------------------------------------

  // A piece: 32 dims from chunk c on of row r of each thread, 8 of its accumulators.
  static constexpr __device__ int piece_of(int r, int c) { return c / 2 + r; }
  static constexpr __device__ int element(int piece, int e) { return (piece / 2 * 4 + e / 2) * 4 + (piece & 1) * 2 + (e & 1); }

  // Those that had no tile join and write, too.
  __device__ void merge(int tiles) {
    const int mine = own_group(), active = min(tiles, C::kGroups);
    const int4 place = get_shared(item_at()), more = get_shared(item_at() + 16);
    if (mine < active) hand_over(mine);
    __syncthreads();
    join(mine, active);
    write(place, more, [mine](int r, int c) { return piece_of(r, c) % C::kGroups == mine; });
  }

  // Where warpgroup `from` leaves a piece, and the statistics of row r, for the one that joins the piece.
  __device__ uint32_t piece_at(int from, int piece) const {
    const int to = piece % C::kGroups, place = to * C::kMostPieces + piece / C::kGroups;
    const int sender = from - (from > to);
    return memory + C::kPiecesAt + (place * (C::kGroups - 1) + sender) * C::kPieceBytes + (warp * 32 + lane) * 16;
  }
  __device__ uint32_t stat_at(int from, int r) const {
    return memory + C::kStatsAt + from * C::kStatBytes + (r * 128 + warp * 32 + lane) * 8;
  }

  __device__ void hand_over(int mine) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(stat_at(mine, r)), "f"(rows.shift[r]), "f"(rows.row_sum[r])
                   : "memory");
#pragma unroll
    for (int piece = 0; piece < C::kPieces; ++piece) {
      if (piece % C::kGroups == mine) continue;
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float(&o)[C::kDim / 2] = rows.o;
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(piece_at(mine, piece) + e / 4 * 2048),
                     "f"(o[element(piece, e)]), "f"(o[element(piece, e + 1)]), "f"(o[element(piece, e + 2)]),
                     "f"(o[element(piece, e + 3)])
                     : "memory");
      }
    }
  }

  // The sums of all active warpgroups, in their order, in the place of this one's; of its own pieces.
  __device__ void join(int mine, int active) {
    float weight[2][C::kGroups];
#pragma unroll
    for (int r = 0; r < 2; ++r) join_statistics(r, active, weight[r]);
#pragma unroll
    for (int piece = 0; piece < C::kPieces; ++piece) {
      if (piece % C::kGroups != mine) continue;
      float sums[8] = {};
#pragma unroll
      for (int g = 0; g < C::kGroups; ++g) {
        if (g >= active) continue;
        float other[8];
        if (g == mine) {
#pragma unroll
          for (int e = 0; e < 8; ++e) other[e] = rows.o[element(piece, e)];
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h)
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                         : "=f"(other[h * 4]), "=f"(other[h * 4 + 1]), "=f"(other[h * 4 + 2]), "=f"(other[h * 4 + 3])
                         : "r"(piece_at(g, piece) + h * 2048)
                         : "memory");
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e] = fmaf(other[e], weight[piece & 1][g], sums[e]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) rows.o[element(piece, e)] = sums[e];
    }
  }

  // Maximum and sum of row r over all active warpgroups; what the sums of each are to be multiplied by.
  __device__ void join_statistics(int r, int active, float (&weight)[C::kGroups]) {
    float sum[C::kGroups], top = -INFINITY, total = 0.f;
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      weight[g] = -INFINITY, sum[g] = 0.f;
      if (g < active)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(weight[g]), "=f"(sum[g]) : "r"(stat_at(g, r)) : "memory");
      top = fmaxf(top, weight[g]);
    }
    const float offset = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      weight[g] = exp2_fast(weight[g] - offset);
      total = fmaf(sum[g], weight[g], total);
    }
    rows.shift[r] = top, rows.row_sum[r] = total;
  }

  template <class Mine>
  __device__ void write(const int4& place, const int4& more, Mine mine) const {
    if (more.z < 0) rows.write_output({place.y, place.z, place.w}, place.x, mine);
    else rows.write_part(layout, more.z, more.w, mine);
  }
};

}  // namespace stof::cuda
