// The Hopper kernel's producer: one thread a set, which keeps the ring full.
#pragma once

#include "common.cuh"
#include "hopper_config.cuh"

namespace stof::cuda {

// Brings every item of a set: its queries, then keys 0, keys 1 with values 0, keys 2 with values 1, and so on, the order in which
// they are used up.
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
    const int group = static_cast<int>(layout.group_copies.divisor);
    const StayingOrder order{items, group < layout.copies ? __ldg(layout.header + 7) : 0, layout.copies, group};
    int unit = set * gridDim.x + blockIdx.x;
    for (int other = 2 * sets - 1 - unit; unit < units;) {
      bring(order.at(unit));
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

  __device__ void bring(const Assignment& mine) {
    const int4* item = reinterpret_cast<const int4*>(layout.items + static_cast<int64_t>(mine.item) * kItemInts);
    const int4 head = __ldg(item), more = __ldg(item + 1);
    const int4* columns = reinterpret_cast<const int4*>(layout.col) + head.y;
    const Instance at = instance_of(p, more.z, mine.copy);
    bring_queries(head, more, at, mine.copy);
    if (head.z == 0) return;
    // The item carries its first tile's runs, so the first keys need not wait for the column list.
    int4 keys = __ldg(item + 2), values = keys;
    for (int tile = 0; tile <= head.z; ++tile) {
      const int4 next = __ldg(columns + min(tile + 1, head.z - 1));  // comes while this thread waits for a slot
      bring_step(keys, values, at, tile, head.z, more);
      values = keys, keys = next;
    }
  }

  // Keys of tile `tile` of `tiles`, with their bitmap if they have one, and values of the tile before.
  __device__ void bring_step(const int4& keys, const int4& values, const Instance& at, int tile, int tiles, const int4& more) {
    const int partial = tile < tiles ? tile - more.x : -1;  // its place among the tiles that have a bitmap
    const int key_bytes = (tile < tiles ? C::kTileBytes : 0) + (partial >= 0 ? C::kWordBytes : 0);
    const int value_bytes = tile > 0 ? C::kTileBytes : 0;
    if (C::kPaired) claim(key_bytes + value_bytes);
    if (tile < tiles) {
      if (!C::kPaired) claim(key_bytes);
      copy_tile(&maps.k_run, &maps.k_tile, keys, at, slot());
      if (partial >= 0)
        copy_bytes(memory + C::kWordsAt + place.slot * C::kWordBytes,
                   layout.bits + static_cast<int64_t>(more.y + partial) * (C::kWordBytes / 4), C::kWordBytes,
                   control.full(place.slot));
      if (!C::kPaired) place.advance();
    }
    if (tile > 0) {
      if (!C::kPaired) claim(value_bytes);
      copy_tile(&maps.v_run, &maps.v_tile, values, at, slot() + C::kSlotBytes - C::kTileBytes);
      if (!C::kPaired) place.advance();
    }
    if (C::kPaired) place.advance();
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

  __device__ uint32_t slot() const { return memory + C::kQueryBytes + place.slot * C::kSlotBytes; }

  // Waits until the slot is free, and tells its barrier what comes.
  __device__ void claim(int bytes) {
    barrier_wait(control.empty(place.slot), place.parity ^ 1);
    barrier_expect(control.full(place.slot), bytes);
  }

  // Keys or values of one tile. An absent run reads past the last row: zeros.
  __device__ void copy_tile(const CUtensorMap* run_map, const CUtensorMap* tile_map, const int4& runs, const Instance& at,
                            uint32_t dst) {
    const uint32_t full = control.full(place.slot);
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

}  // namespace stof::cuda
