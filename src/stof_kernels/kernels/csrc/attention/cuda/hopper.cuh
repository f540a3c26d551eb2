// Block-wise attention on Hopper: warpgroups multiply (wgmma) what a producer warp brings by bulk tensor copies (TMA).
//
// A block holds sets of warpgroups; it stays and works through items. A set shares one work item at a time, 64 query rows a
// warpgroup, and a ring of slots, each with the keys or the values of one packed tile; one warp of the producer warpgroup
// serves each set and runs ahead of it, into the next item too. Queries and probabilities are operands in registers.
#pragma once

#include "common.cuh"
#include "hopper_ptx.cuh"

namespace stof::cuda {

template <typename T_, int kDim_, int kSets_, int kShare_, int kSlots_, int kRegisters_>
struct HopperConfig {
  using T = T_;
  static constexpr int kDim = kDim_;              // head dim, padded: 64 or 128
  static constexpr int kSets = kSets_;            // of warpgroups, each with items of its own
  static constexpr int kShare = kShare_;          // warpgroups of a set
  static constexpr int kSlots = kSlots_;          // of a set's ring
  static constexpr int kRegisters = kRegisters_;  // of a thread that multiplies

  static constexpr int kRows = kShare * 64;  // query tile
  static constexpr int kKeys = 64;           // key tile
  static constexpr int kRun = 16;
  static constexpr int kBlocks = kDim / 64;          // blocks of 64 dims, whose rows of 128 bytes are swizzled
  static constexpr int kBlockBytes = kKeys * 128;    // of one block of a slot
  static constexpr int kSlotBytes = kBlocks * kBlockBytes;
  static constexpr int kWordBytes = kRows * 8;       // bitmap of one tile
  static constexpr int kQueryBlockBytes = kRows * 128;
  static constexpr int kQueryBytes = kBlocks * kQueryBlockBytes;
  static constexpr int kWordsAt = kQueryBytes + kSlots * kSlotBytes;  // bitmaps that came with the keys of a slot
  static constexpr int kSetBytes = (kWordsAt + kSlots * kWordBytes + 1023) / 1024 * 1024;
  static constexpr int kWarpgroups = kSets * kShare;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kControlBytes = 1536;  // of a block: barriers, and what the producers say about their items
  static constexpr int kSharedBytes = kSets * kSetBytes + kControlBytes + 1024;  // the last to align the first
  // A launch gives all threads as many registers; what those that multiply leave is the producers'.
  static constexpr int kProducerRegisters = 65536 / kThreads / 8 * 8 * (kThreads / 128) - kWarpgroups * kRegisters;
  static_assert(kProducerRegisters >= 24 && kProducerRegisters <= 160 && kProducerRegisters % 8 == 0, "registers");
  static_assert(kSharedBytes <= 227 * 1024, "shared memory");
  static_assert(kSets <= 4, "a producer warp a set");
  static_assert(kSlots >= 4, "keys of this step and the next, values of this and the last");
};

// Maps of the operands for the copy engine: boxes of 64 dims and one run, or 64 rows.
struct HopperMaps {
  CUtensorMap q, k_run, k_tile, v_run, v_tile;
};

// What a producer says about an item; `tiles` < 0: there are no more.
struct HopperItem {
  int row0, tiles, full_tiles, part, batch, head, copy;
};

// Barriers and items of one set, by their shared addresses: 32 bits, where a pointer takes two registers. There are two places
// for items, so that an item can still be read when its queries have made room for the next one's.
template <int kSlots>
struct HopperControl {
  uint32_t base;  // a multiple of 16

  static constexpr int kBytes = 80 + 16 * kSlots;

  __device__ __forceinline__ uint32_t query_full() const { return base + 64; }
  __device__ __forceinline__ uint32_t query_empty() const { return base + 72; }
  __device__ __forceinline__ uint32_t full(int slot) const { return base + 80 + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return base + 80 + 8 * kSlots + 8 * slot; }

  __device__ __forceinline__ void put(uint32_t lap, const HopperItem& i) const {
    const uint32_t at = base + lap * 32;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(at), "r"(i.tiles), "r"(i.full_tiles), "r"(i.row0), "r"(i.part)
                 : "memory");
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};\n" ::"r"(at + 16), "r"(i.batch), "r"(i.head), "r"(i.copy) : "memory");
  }

  // What the work on an item needs, and the rest.
  __device__ __forceinline__ int2 lengths(uint32_t lap) const {
    int2 i;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(i.x), "=r"(i.y) : "r"(base + lap * 32) : "memory");
    return i;
  }

  __device__ __forceinline__ HopperItem get(uint32_t lap) const {
    HopperItem i;
    int unused;
    const uint32_t at = base + lap * 32;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(i.tiles), "=r"(i.full_tiles), "=r"(i.row0), "=r"(i.part)
                 : "r"(at)
                 : "memory");
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(i.batch), "=r"(i.head), "=r"(i.copy), "=r"(unused)
                 : "r"(at + 16)
                 : "memory");
    return i;
  }
};

// A place in the ring, and on which lap: the parity of its barriers' phases.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// ---- producer ---------------------------------------------------------------------------------------------------------

// One thread; brings every item of a set: its queries, then keys 0, keys 1, values 0, keys 2, values 1, and so on, the order
// in which they are used up.
template <class C>
class HopperProducer {
  using Control = HopperControl<C::kSlots>;

 public:
  __device__ HopperProducer(const Problem& p, const BlockLayout& layout, const HopperMaps& maps, uint32_t memory,
                            Control control)
      : p(p), layout(layout), maps(maps), memory(memory), control(control) {}

  __device__ void run(int set) {
    const int items = layout.exact ? layout.item_limit : __ldg(layout.header);
    // Items come longest first. The first is dealt; what follows goes to whoever is ready, or, where nothing counts, backwards
    // and forwards in turn, so that no set gets the longest of each round.
    const int units = items * layout.copies, sets = C::kSets * gridDim.x;
    int unit = set * gridDim.x + blockIdx.x;
    for (int other = 2 * sets - 1 - unit; unit < units;) {
      bring(assigned(unit, items));
      if (layout.next_unit != nullptr) {
        unit = sets + atomicAdd(layout.next_unit, 1);
      } else {
        const int next = other;
        other = unit + 2 * sets, unit = next;
      }
    }
    barrier_wait(control.query_empty(), query_parity ^ 1);
    control.put(query_parity, {0, -1, 0, 0, 0, 0, 0});
    barrier_arrive(control.query_full());
  }

 private:
  const Problem& p;
  const BlockLayout& layout;
  const HopperMaps& maps;
  const uint32_t memory;
  const Control control;
  uint32_t query_parity = 0;
  RingPlace<C::kSlots> place;

  // Copies of the mask go in groups whose keys fit in L2; inside a group the longest items of all its copies come first.
  __device__ Assignment assigned(int unit, int items) const {
    const int group_copies = static_cast<int>(layout.group_copies.divisor);
    const int group = unit / (items * group_copies), index = unit - group * items * group_copies;
    const int first_copy = group * group_copies, side = min(group_copies, layout.copies - first_copy);
    const int item = index / side;
    return {item, first_copy + index - item * side};
  }

  __device__ void bring(const Assignment& mine) {
    const int4* item = reinterpret_cast<const int4*>(layout.items + static_cast<int64_t>(mine.item) * kItemInts);
    const int4 head = __ldg(item), more = __ldg(item + 1);
    const int4* columns = reinterpret_cast<const int4*>(layout.col) + head.y;
    const Instance at = instance_of(p, more.z, mine.copy);
    bring_queries(head, more, at, mine.copy);
    if (head.z == 0) return;
    // The item carries its first tile's runs, so the first keys need not wait for the column list.
    bring_keys(__ldg(item + 2), at, 0, more);
    for (int tile = 1; tile < head.z; ++tile) {
      bring_keys(__ldg(columns + tile), at, tile, more);
      bring_values(__ldg(columns + tile - 1), at);
    }
    bring_values(__ldg(columns + head.z - 1), at);
  }

  __device__ void bring_keys(const int4& runs, const Instance& at, int tile, const int4& more) {
    const int partial = tile - more.x;  // its place among the tiles that have a bitmap
    const uint32_t full = claim(C::kSlotBytes + (partial >= 0 ? C::kWordBytes : 0));
    copy_tile(&maps.k_run, &maps.k_tile, runs, at, full);
    if (partial >= 0)
      copy_bytes(memory + C::kWordsAt + place.slot * C::kWordBytes,
                 layout.bits + static_cast<int64_t>(more.y + partial) * (C::kWordBytes / 4), C::kWordBytes, full);
    place.advance();
  }

  __device__ void bring_queries(const int4& head, const int4& more, const Instance& at, int copy) {
    const int row0 = head.x * C::kRows;
    const uint32_t full = control.query_full();
    barrier_wait(control.query_empty(), query_parity ^ 1);
    control.put(query_parity, {row0, head.z, more.x, head.w, at.batch, at.head, copy});
    query_parity ^= 1;
    barrier_expect(full, C::kQueryBytes);
#pragma unroll
    for (int b = 0; b < C::kBlocks; ++b)
#pragma unroll
      for (int g = 0; g < C::kShare; ++g)
        copy_box(memory + b * C::kQueryBlockBytes + g * 64 * 128, &maps.q, full, b * 64, row0 + g * 64, at.head, at.batch);
  }

  __device__ void bring_values(const int4& runs, const Instance& at) {
    const uint32_t full = claim(C::kSlotBytes);
    copy_tile(&maps.v_run, &maps.v_tile, runs, at, full);
    place.advance();
  }

  // Waits until the slot is free; its barrier for the copies.
  __device__ uint32_t claim(int bytes) {
    barrier_wait(control.empty(place.slot), place.parity ^ 1);
    const uint32_t full = control.full(place.slot);
    barrier_expect(full, bytes);
    return full;
  }

  // Keys or values of one tile. An absent run reads past the last row: zeros.
  __device__ void copy_tile(const CUtensorMap* run_map, const CUtensorMap* tile_map, const int4& runs, const Instance& at,
                            uint32_t full) {
    const uint32_t dst = memory + C::kQueryBytes + place.slot * C::kSlotBytes;
    if (runs.x >= 0 && runs.y == runs.x + 1 && runs.z == runs.x + 2 && runs.w == runs.x + 3) {
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b)
        copy_box(dst + b * C::kBlockBytes, tile_map, full, b * 64, runs.x * C::kRun, at.kv_head, at.batch);
      return;
    }
    const int run[4] = {runs.x, runs.y, runs.z, runs.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = run[r] < 0 ? p.kv_len : run[r] * C::kRun;
#pragma unroll
      for (int b = 0; b < C::kBlocks; ++b)
        copy_box(dst + b * C::kBlockBytes + r * C::kRun * 128, run_map, full, b * 64, row, at.kv_head, at.batch);
    }
  }
};

// ---- consumer ---------------------------------------------------------------------------------------------------------

template <class C>
class HopperConsumer {
  using T = typename C::T;
  using Control = HopperControl<C::kSlots>;
  using Scores = float[C::kKeys / 2];

 public:
  __device__ HopperConsumer(const Problem& p, const BlockLayout& layout, uint32_t memory, Control control, int group)
      : p(p), layout(layout), memory(memory), control(control), warp(group * 4 + ((threadIdx.x >> 5) & 3)),
        lane(threadIdx.x & 31), ring(memory + C::kQueryBytes) {}

  __device__ void run() {
    for (uint32_t lap = 0;; lap ^= 1) {
      barrier_wait(control.query_full(), lap);
      const int2 lengths = control.lengths(lap);
      if (lengths.x < 0) return;
      load_queries();
      release(control.query_empty());
      work(lengths.x, lengths.y);
      finish_rows();
      const HopperItem item = control.get(lap);
      if (item.part < 0) write_output(item);
      else write_part(item);
    }
  }

 private:
  const Problem& p;
  const BlockLayout& layout;
  const uint32_t memory;
  const Control control;
  const int warp, lane;  // warp of the set
  const uint32_t ring;
  RingPlace<C::kSlots> place;
  uint32_t q[C::kDim / 16][4];
  float o[C::kDim / 2];
  uint32_t probability[C::kKeys / 16][4];
  // Of the two rows of a thread: what scores are relative to, in log2 units and negated; sum of the probabilities.
  float shift[2], row_sum[2], factor[2];

  // Sum of a thread's probabilities of one row and tile: up to here each of them fits the operand's type.
  static constexpr float kMostSum = 32768.f;
  // Shift of a row with nothing to attend so far: any score becomes infinite, and the sum shows it.
  static constexpr float kEmpty = 3e38f;

  // All lanes are done with what the barrier guards.
  __device__ void release(uint32_t empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  }

  __device__ void load_queries() {
    const int row = warp * 16 + (lane & 15);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int chunk = (k & 3) * 2 + (lane >> 4);
      load_matrices(q[k], memory + k / 4 * C::kQueryBlockBytes + row * 128 + ((chunk ^ (row & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) q[k][i] ^= p.q_flip;
    }
  }

  // Starts the products of queries and the keys of a slot.
  __device__ void start_scores(Scores& s, int slot) {
    const uint32_t keys = descriptor_low(ring + slot * C::kSlotBytes, 0);
    products_begin();
    warpgroup_multiply<T, false, true>(s, q[0], descriptor(keys), 0);
#pragma unroll
    for (int k = 1; k < C::kDim / 16; ++k)
      warpgroup_multiply<T, false, false>(s, q[k], descriptor(keys + (k / 4 * C::kBlockBytes + (k & 3) * 32) / 16), 1);
    products_commit();
  }

  // `first`: nothing was summed before; registers are not set to zero, which would have to wait for running products.
  __device__ void start_output(int slot, bool first) {
    const uint32_t values = descriptor_low(ring + slot * C::kSlotBytes, C::kBlockBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k)
      warpgroup_multiply<T, true, false>(o, probability[k], descriptor(values + k * 16 * 128 / 16), k > 0 || !first);
    products_commit();
  }

  // While a tile's scores become probabilities, the product of the last tile's with its values runs.
  __device__ void work(int tiles, int full_tiles) {
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = kEmpty, row_sum[r] = 0.f;
    if (tiles == 0) {
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0.f;
      return;
    }
    barrier_wait(control.full(place.slot), place.parity);
    first_tile(full_tiles == 0);
    release(control.empty(place.slot));
    place.advance();
    bool ready = barrier_ended(control.full(place.slot), place.parity);
#pragma unroll 1
    for (int tile = 1; tile < tiles; ++tile) {
      const int keys = place.slot;
      if (!ready) barrier_wait(control.full(keys), place.parity);
      Scores s;
      start_scores(s, keys);
      place.advance();
      const int values = place.slot;
      barrier_wait(control.full(values), place.parity);
      start_output(values, tile == 1);
      place.advance();
      ready = barrier_ended(control.full(place.slot), place.parity);
      products_wait<1>();
      pin_registers(s);
      mask_scores(s, tile >= full_tiles, keys);
      if (softmax(s)) {
        pin_registers(s);
        products_wait<0>();
        pin_registers(o);
        pack(s);
      } else {
        products_wait<0>();
        pin_registers(o);
        repeat_tile(tile >= full_tiles, keys);
      }
      release(control.empty(keys));
      if (lane == 0) barrier_arrive(control.empty(values));
    }
    barrier_wait(control.full(place.slot), place.parity);
    start_output(place.slot, tiles == 1);
    products_wait<0>();
    pin_registers(o);
    release(control.empty(place.slot));
    place.advance();
  }

  __device__ void first_tile(bool partial) {
    Scores s;
    start_scores(s, place.slot);
    products_wait<0>();
    pin_registers(s);
    mask_scores(s, partial, place.slot);
    exact_softmax(s);
    pack(s);
  }

  // A tile whose scores are far above those before. Its scores were overwritten; one warp alone cannot use the warpgroup's
  // products, so it makes them again with its own.
  __device__ void repeat_tile(bool partial, int keys) {
    Scores s;
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) s[i] = 0.f;
    const int row = (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int chunk = (k & 3) * 2 + ((lane >> 3) & 1);
      const uint32_t from = ring + keys * C::kSlotBytes + k / 4 * C::kBlockBytes + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
      for (int n = 0; n < C::kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, from + n * 16 * 128);
        Element<T>::multiply(reinterpret_cast<float(&)[4]>(s[n * 8]), q[k], b[0], b[1]);
        Element<T>::multiply(reinterpret_cast<float(&)[4]>(s[n * 8 + 4]), q[k], b[2], b[3]);
      }
    }
    mask_scores(s, partial, keys);
    exact_softmax(s);
    pack(s);
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] *= factor[(i >> 1) & 1];
  }

  // Removed positions become -inf. One word a tile, in accumulator order; full tiles have none.
  __device__ void mask_scores(Scores& s, bool partial, int keys) {
    if (!partial) return;
    uint32_t word;
    const uint32_t address = memory + C::kWordsAt + keys * C::kWordBytes + (warp * 32 + lane) * 4;
    asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(word) : "r"(address));
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = (word >> i) & 1u ? s[i] : -INFINITY;
  }

  // Scores to probabilities, and their sums.
  __device__ void exponentials(Scores& s, float (&sum)[2]) {
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) {
      const int r = (i >> 1) & 1;
      s[i] = exp2_fast(fmaf(s[i], p.scale_log2, shift[r]));
      part[r][i & 1] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = part[r][0] + part[r][1];
  }

  // Softmax relative to what earlier tiles were relative to, which saves looking for the maximum: what is kept is as exact, for
  // all sums are relative to the same number. False, and nothing added, if some score of the warp is too far above it.
  __device__ bool softmax(Scores& s) {
    float sum[2];
    exponentials(s, sum);
    const bool fits = __all_sync(0xffffffffu, sum[0] <= kMostSum && sum[1] <= kMostSum);
    if (fits) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum[r] += sum[r];
    }
    return fits;
  }

  // Softmax relative to the maximum so far; what was summed before must be multiplied by `factor`.
  __device__ void exact_softmax(Scores& s) {
    float top[2] = {-INFINITY, -INFINITY}, sum[2];
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) top[(i >> 1) & 1] = fmaxf(top[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      const float old = shift[r];
      shift[r] = top[r] == -INFINITY ? old : fminf(old, -top[r] * p.scale_log2);
      factor[r] = old == kEmpty ? 0.f : exp2_fast(shift[r] - old);
    }
    exponentials(s, sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) row_sum[r] = fmaf(row_sum[r], factor[r], sum[r]);
  }

  // Probabilities to operands, once no running product reads the last ones: row, row + 8, then the same of the next 8 keys.
  __device__ void pack(const Scores& s) {
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probability[k][i] = Element<T>::pack(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
  }

  // The four threads of a row join their sums. From here on `shift` is the maximum that sums are relative to.
  __device__ void finish_rows() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
      shift[r] = shift[r] == kEmpty ? -INFINITY : -shift[r];
    }
  }

  // The four threads of a row trade their pairs of columns for whole chunks of 8, so that a store is 16 bytes.
  __device__ void write_output(const HopperItem& item) const {
    T* out = static_cast<T*>(p.out) + item.batch * p.out_stride.batch + item.head * p.out_stride.head;
    const Instance at{item.batch, item.head, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = item.row0 + warp * 16 + r * 8 + (lane >> 2);
      const bool inside = row < p.q_len;
      const float sum = row_sum[r], scale = sum == 0.f ? 0.f : reciprocal_fast(sum);
#pragma unroll
      for (int c = 0; c < C::kDim / 8; c += 4) {
        uint32_t mine[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mine[j] = Element<T>::pack(o[(c + j) * 4 + r * 2] * scale, o[(c + j) * 4 + r * 2 + 1] * scale);
        exchange(mine);
        const int chunk = c + (lane & 3);
        if (inside && chunk * 8 < p.head_dim)
          *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * p.out_stride.row + chunk * 8) =
              make_uint4(mine[0], mine[1], mine[2], mine[3]);
      }
      if (p.lse != nullptr && (lane & 3) == 0 && inside)
        p.lse[lse_index(p, at, row)] = sum == 0.f ? -INFINITY : (shift[r] + log2_fast(sum)) * kLn2;
    }
  }

  // Transposes 4 words of 4 neighbouring threads: word j of thread i goes to word i of thread j.
  __device__ void exchange(uint32_t (&word)[4]) const {
    const bool odd = lane & 1, high = lane & 2;
    uint32_t a = odd ? word[0] : word[1], b = odd ? word[2] : word[3];
    a = __shfl_xor_sync(0xffffffffu, a, 1), b = __shfl_xor_sync(0xffffffffu, b, 1);
    if (odd) word[0] = a, word[2] = b;
    else word[1] = a, word[3] = b;
    a = high ? word[0] : word[2], b = high ? word[1] : word[3];
    a = __shfl_xor_sync(0xffffffffu, a, 2), b = __shfl_xor_sync(0xffffffffu, b, 2);
    if (high) word[0] = a, word[1] = b;
    else word[2] = a, word[3] = b;
  }

  // Sums of a part of a query tile whose key list was cut, joined later by the combine kernel.
  __device__ void write_part(const HopperItem& item) const {
    const int64_t first = (static_cast<int64_t>(item.part) * layout.copies + item.copy) * C::kRows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + warp * 16 + r * 8 + (lane >> 2);
      if ((lane & 3) == 0) layout.part_stat[row] = make_float2(shift[r], row_sum[r]);
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
        if (n * 8 >= p.head_dim) break;
        *reinterpret_cast<float2*>(layout.part_out + row * p.head_dim + n * 8 + (lane & 3) * 2) =
            make_float2(o[n * 4 + r * 2], o[n * 4 + r * 2 + 1]);
      }
    }
  }
};

}  // namespace stof::cuda
