// Block-wise attention on Hopper for short calls: the key tiles of one work item are dealt to the warpgroups of a block, or of
// the two blocks of a cluster, each of which brings its own by bulk tensor copies, and the partial results are merged in shared
// memory, in a fixed order.
//
// There is no producer: first threads of warps copy keys, values, and the block's queries. Whatever needs no tensor of the call
// (lists, barriers, tensor maps) is done before the call before this one has ended, where the layout allows it.
#pragma once

#include "hopper_split_join.cuh"
#include "launch.h"

namespace stof::cuda {

template <class C>
class HopperSplit {
  using Scores = typename HopperRows<C>::Scores;
  using Item = HopperSplitItem<C>;
  using Operand = typename HopperRows<C>::Operand;

 public:
  __device__ HopperSplit(const Problem& p, const BlockLayout& layout, const HopperMaps& maps, uint32_t memory)
      : p(p), layout(layout), maps(maps), memory(memory), own_memory(memory + own_warpgroup() * C::kGroupBytes), item{memory},
        warp((threadIdx.x >> 5) & 3), lane(threadIdx.x & 31), rows(p, warp) {}

  // What needs nothing that an earlier kernel writes, but the layout. `may_share`: the other block of the cluster has the same
  // item. False if nothing is left to do for this one.
  __device__ bool prepare(const Assignment& mine, bool may_share) {
    const int4* from = reinterpret_cast<const int4*>(layout.items + static_cast<int64_t>(mine.item) * kItemInts);
    const int4 head = __ldg(from), more = __ldg(from + 1);
    const bool shared = C::kShares && may_share && head.z >= C::kLeastShared;
    if (C::kShares && may_share && !shared && cluster_rank() > 0) return false;
    const int dealt = shared ? 2 * C::kGroups : C::kGroups;
    const int group = shared ? own_warpgroup() * 2 + cluster_rank() : own_warpgroup();
    own = own_of(head.z, group, dealt);
    const int thread = warp * 32 + lane;
    if (thread < C::kColumns && thread < own) store_shared(columns() + thread * 16, column(head.y + group + thread * dealt));
    if (threadIdx.x == 64) {
      const Instance at = instance_of(p, more.z, mine.copy);
      store_shared(item.where(), make_int4(head.x * C::kRows, at.batch, at.head, at.kv_head));
      store_shared(item.where() + 16, make_int4(head.y, more.y - more.x, head.w, mine.copy));
      store_shared(item.tiles_at(), make_int2(head.z, dealt));
      barrier_init(item.query_full(), 1);
      if (shared) {
        barrier_init(item.inbox_full(), 1);
        barrier_expect(item.inbox_full(), C::kInboxBytes);
      }
    }
    if (thread == 96) {
      store_shared(dealt_at(), make_int2(own_of(more.x, group, dealt), group));
      for (int s = 0; s < C::kStages; ++s) {
        barrier_init(full(s, 0), 1), barrier_init(full(s, 1), 1);
        barrier_init(empty(s, 0), 4), barrier_init(empty(s, 1), 4);
      }
    }
    if (thread >= 64) barrier_init_fence();
    if (thread < 5) prefetch_map(&maps.q + thread);
    __syncthreads();
    // The other block may send from here on; it looks before it does (HopperJoin::join_half).
    if (shared) cluster_arrive();
    return true;
  }

  // The first copies, keys and values of two tiles at a time by a warp each, as soon as what earlier kernels wrote can be read;
  // bitmaps even before. A block without a tile copies nothing, for it would not wait for it.
  __device__ void start() {
    const int first = warp / 2, is_value = warp % 2, here = min(own, C::kStages);
    const bool brings = lane == 0;
    const bool brings_queries = threadIdx.x == C::kThreads - 32 && item.tiles().x > 0;
    const Source from = source(min(first, C::kStages - 1));
    if (brings) {
      for (int i = first; i < here; i += 2) announce(i, is_value);
    }
    if (brings_queries) barrier_expect(item.query_full(), C::kTileBytes);
    wait_for_predecessor();
    if (brings_queries) {
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b)
        copy_box(memory + C::kQueriesAt + b * C::kBlockBytes, &maps.q, item.query_full(), b * 64, from.place.x, from.place.z,
                 from.place.y);
    }
    if (brings && first < here) {
      bring(from, first, is_value);
      for (int i = first + 2; i < here; i += 2) bring(source(i), i, is_value);
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
    Operand probability;
    barrier_wait(item.query_full(), 0);
    rows.load_queries(memory + C::kQueriesAt);
    barrier_wait(full(0, 0), 0);
    {
      Scores s;
      rows.first_scores(s, slot(0, 0));
      rows.first_softmax(s, is_partial(0), words(0), probability);
    }
    release(0, 0);
#pragma unroll 1
    for (int i = 1; i < own; ++i) {
      const bool partial = is_partial(i);
      barrier_wait(full(i, 0), parity(i));
      Scores s;
      rows.start_scores(s, slot(i, 0));
      barrier_wait(full(i - 1, 1), parity(i - 1));
      rows.start_output(slot(i - 1, 1), probability, i == 1);
      products_wait<1>();
      pin_registers(s);
      if (partial) {
        rows.mask_scores(s, words(i));
        rows.meet_first_keys(s);
      }
      float sum[2];
      rows.exponentials(s, sum);
      const bool fits = rows.add(sum);
      pin_registers(s);
      products_wait<0>();  // where no warp has parted from the others
      pin_registers(rows.o);
      if (fits) rows.pack(s, probability);
      else rows.repeat_tile(slot(i, 0), partial, words(i), probability);
      release(i, 0);
      release(i - 1, 1);
    }
    barrier_wait(full(own - 1, 1), parity(own - 1));
    rows.start_output(slot(own - 1, 1), probability, own == 1);
    rows.finish();
    products_wait<0>();
    pin_registers(rows.o);
  }

  // Joins what the warpgroups have, in their order, and writes it.
  __device__ void finish() {
    const int tiles = item.tiles().x, group = own_warpgroup();
    const bool shared = item.is_shared();
    const int active = min(max(shared ? (tiles + 1 - cluster_rank()) >> 1 : tiles, 1), C::kGroups);
    const HopperJoin<C> join(p, layout, memory);
    if (group < active) {
      warpgroup_barrier(group);  // all its warps are done with the tiles
      join.hand_over(rows, group, warp, lane);
    }
    __syncthreads();
    if (C::kShares && shared) join.join_half(active);
    else join.join_all(active);
  }

 private:
  const Problem& p;
  const BlockLayout& layout;
  const HopperMaps& maps;
  const uint32_t memory, own_memory;  // of the block, of the warpgroup
  const Item item;
  const int warp, lane;
  HopperRows<C> rows;
  int own;  // tiles of this warpgroup: the item's are dealt in turn to the warpgroups that share it

  // Of this warpgroup's tile `i`.
  static __device__ int stage(int i) { return static_cast<unsigned>(i) % C::kStages; }
  static __device__ uint32_t parity(int i) { return static_cast<unsigned>(i) / C::kStages & 1; }
  __device__ uint32_t slot(int i, int is_value) const { return own_memory + (stage(i) * 2 + is_value) * C::kTileBytes; }
  __device__ uint32_t words(int i) const { return own_memory + C::kWordsAt + stage(i) * C::kWordBytes; }
  __device__ uint32_t full(int i, int is_value) const { return own_memory + C::kBarriersAt + (stage(i) * 2 + is_value) * 16; }
  __device__ uint32_t empty(int i, int is_value) const { return full(i, is_value) + 8; }
  __device__ uint32_t columns() const { return own_memory + C::kColumnsAt; }

  // Of this warpgroup: how many of its tiles are full, which come first, and its number among those that share the item.
  __device__ uint32_t dealt_at() const { return own_memory + C::kBarriersAt + C::kStages * 32; }
  __device__ int2 dealt() const { return load_shared2(dealt_at()); }
  // Whether its tile `i` has a bitmap.
  __device__ bool is_partial(int i) const { return i >= dealt().x; }

  // How many of the item's first `n` tiles are that warpgroup's, of `dealt` of them.
  static __device__ int own_of(int n, int group, int dealt) { return n > group ? (n - group - 1) / dealt + 1 : 0; }

  // Runs of a key tile.
  __device__ int4 column(int tile) const { return __ldg(reinterpret_cast<const int4*>(layout.col) + tile); }

  // Where its tile `i` is among the item's.
  __device__ int number(int i) const { return dealt().y + i * (C::kShares ? item.tiles().y : C::kGroups); }

  // What is copied for this warpgroup's tile `i`: what the block knows of the item, and the tile's runs.
  struct Source {
    int4 place, more, runs;
  };
  __device__ Source source(int i) const {
    Source from{item.place(), item.more(), {}};
    from.runs = i < C::kColumns ? load_shared4(columns() + i * 16) : column(from.more.x + number(i));
    return from;
  }

  // Tells the barrier of keys or values of tile `i` what comes, and brings its bitmap, which is of the layout and not of the call.
  __device__ void announce(int i, int is_value) const {
    const bool has_words = is_value == 0 && is_partial(i);
    barrier_expect(full(i, is_value), C::kTileBytes + (has_words ? C::kWordBytes : 0));
    if (!has_words) return;
    const int64_t bits = item.more().y + number(i);
    copy_bytes(words(i), layout.bits + bits * (C::kWordBytes / 4), C::kWordBytes, full(i, 0));
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
};

}  // namespace stof::cuda
