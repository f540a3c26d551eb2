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
  // Results are joined row by row, as floats in shared memory; rows lie so that accumulators are stored without bank conflicts.
  static constexpr int kResultRowBytes = kDim * 4 + 32;
  static constexpr int kResultBytes = kRows * kResultRowBytes;  // of a warpgroup
  static constexpr int kStatBytes = kRows * 8;                  // maximum and sum of its rows

  // A warpgroup's shared memory: its slots first, keys and values of a stage side by side.
  static constexpr int kWordsAt = kStages * 2 * kTileBytes;
  static constexpr int kColumnsAt = kWordsAt + kStages * kWordBytes;
  static constexpr int kBarriersAt = kColumnsAt + kColumns * 16;
  static constexpr int kGroupBytes = (kBarriersAt + kStages * 4 * 8 + 8 + 1023) / 1024 * 1024;
  // A block's: its warpgroups', queries, what the warpgroups have in the end, the item.
  static constexpr int kQueriesAt = kGroups * kGroupBytes;
  static constexpr int kResultsAt = kQueriesAt + kTileBytes;
  static constexpr int kStatsAt = kResultsAt + kGroups * kResultBytes;
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
      const bool fits = rows.softmax(s);
      pin_registers(s);
      products_wait<0>();  // where no warp has parted from the others
      pin_registers(rows.o);
      if (fits) rows.pack(s);
      else rows.repeat_tile(slot(i, 0), partial, words(i));
      release(i, 0);
      release(i - 1, 1);
    }
    barrier_wait(full(own - 1, 1), parity(own - 1));
    rows.start_output(slot(own - 1, 1), own == 1);
    rows.finish();
    products_wait<0>();
    pin_registers(rows.o);
  }

  // Joins what the warpgroups have, in their order, and writes it. All threads share the rows evenly, whoever had tiles: one path for
  // all is shorter than handing each what it needs.
  __device__ void finish() {
    int tiles;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(tiles) : "r"(tiles_at()) : "memory");
    const int active = min(max(tiles, 1), C::kGroups), mine = own_group();
    if (mine < active) hand_over(mine);
    __syncthreads();
    const int4 place = get_shared(item_at()), more = get_shared(item_at() + 16);
    constexpr int kChunks = C::kDim / 8;  // of 8 dims, one a thread
#pragma unroll
    for (int first = 0; first < C::kRows * kChunks; first += C::kThreads) {
      const int unit = first + static_cast<int>(threadIdx.x);
      join(unit / kChunks, unit % kChunks, active, place, more);
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

  // ---- results ----------------------------------------------------------------------------------------------------------

  __device__ uint32_t result_at(int from, int row) const {
    return memory + C::kResultsAt + from * C::kResultBytes + row * C::kResultRowBytes;
  }
  __device__ uint32_t stat_at(int from, int row) const { return memory + C::kStatsAt + from * C::kStatBytes + row * 8; }

  __device__ void hand_over(int mine) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + r * 8 + (lane >> 2);
      const uint32_t to = result_at(mine, row) + (lane & 3) * 8;
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) put_pair(to + n * 32, rows.o[n * 4 + r * 2], rows.o[n * 4 + r * 2 + 1]);
      if ((lane & 3) == 0) put_pair(stat_at(mine, row), rows.shift[r], rows.row_sum[r]);
    }
  }

  static __device__ void put_pair(uint32_t address, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(a), "f"(b) : "memory");
  }
  static __device__ float2 get_pair(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
  }

  static __device__ float4 get_quad(uint32_t address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
    return x;
  }

  // One chunk of a row: the sums of the active warpgroups relative to their largest maximum.
  __device__ void join(int row, int chunk, int active, const int4& place, const int4& more) const {
    const int turned = chunk >> 2 & 1;  // half of the threads read the second half first: no bank conflicts
    float2 stat[C::kGroups];
    float top = -INFINITY, sum = 0.f, o[8] = {};
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      stat[g] = make_float2(-INFINITY, 0.f);
      if (g < active) stat[g] = get_pair(stat_at(g, row));
      top = fmaxf(top, stat[g].x);
    }
    const float offset = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      if (g >= active) break;
      const float weight = exp2_fast(stat[g].x - offset);
      sum = fmaf(stat[g].y, weight, sum);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 part = get_quad(result_at(g, row) + chunk * 32 + (h ^ turned) * 16);
        o[h * 4] = fmaf(part.x, weight, o[h * 4]), o[h * 4 + 1] = fmaf(part.y, weight, o[h * 4 + 1]);
        o[h * 4 + 2] = fmaf(part.z, weight, o[h * 4 + 2]), o[h * 4 + 3] = fmaf(part.w, weight, o[h * 4 + 3]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = turned ? o[e + 4] : o[e], high = turned ? o[e] : o[e + 4];
      o[e] = low, o[e + 4] = high;
    }
    if (more.z < 0) write_output(row, chunk, top, sum, o, place);
    else write_part(row, chunk, top, sum, o, more);
  }

  __device__ void write_output(int tile_row, int chunk, float top, float sum, const float (&o)[8], const int4& place) const {
    const int row = place.x + tile_row;
    if (row >= p.q_len || chunk * 8 >= p.head_dim) return;
    const float scale = sum == 0.f ? 0.f : reciprocal_fast(sum);
    T* out = static_cast<T*>(p.out) + place.y * p.out_stride.batch + place.z * p.out_stride.head;
    *reinterpret_cast<uint4*>(out + row * p.out_stride.row + chunk * 8) =
        make_uint4(Element<T>::pack(o[0] * scale, o[1] * scale), Element<T>::pack(o[2] * scale, o[3] * scale),
                   Element<T>::pack(o[4] * scale, o[5] * scale), Element<T>::pack(o[6] * scale, o[7] * scale));
    if (chunk == 0 && p.lse != nullptr)
      p.lse[lse_index(p, {place.y, place.z, place.w}, row)] = sum == 0.f ? -INFINITY : (top + log2_fast(sum)) * kLn2;
  }

  // Sums of a part of a query tile whose key list was cut, joined later by the combine kernel.
  __device__ void write_part(int tile_row, int chunk, float top, float sum, const float (&o)[8], const int4& more) const {
    if (chunk * 8 >= p.head_dim) return;
    const int64_t row = (static_cast<int64_t>(more.z) * layout.copies + more.w) * C::kRows + tile_row;
    float4* to = reinterpret_cast<float4*>(layout.part_out + row * p.head_dim + chunk * 8);
    to[0] = make_float4(o[0], o[1], o[2], o[3]), to[1] = make_float4(o[4], o[5], o[6], o[7]);
    if (chunk == 0) layout.part_stat[row] = make_float2(top, sum);
  }
};

}  // namespace stof::cuda
