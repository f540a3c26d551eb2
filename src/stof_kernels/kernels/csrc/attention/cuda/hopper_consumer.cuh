// The Hopper kernel's consumer: a warpgroup that works on the items its producer brings.
#pragma once

#include "hopper_config.cuh"
#include "hopper_rows.cuh"

namespace stof::cuda {

template <class C>
class HopperConsumer {
  using Control = HopperControl<C::kSlots>;
  using Scores = typename HopperRows<C>::Scores;

 public:
  __device__ HopperConsumer(const Problem& p, const BlockLayout& layout, uint32_t memory, Control control, int group)
      : layout(layout), memory(memory), control(control), rows(p, group * 4 + ((threadIdx.x >> 5) & 3)) {}

  __device__ void run() {
    for (uint32_t lap = 0;; lap ^= 1) {
      barrier_wait(control.query_full(), lap);
      const int2 lengths = control.lengths(lap);
      if (lengths.x < 0) return;
      work(lengths.x, lengths.y);
      if (lengths.x == 0) release(control.query_empty());  // else first_tile() did
      rows.finish();
      const HopperItem item = control.get(lap);
      if (item.part < 0) rows.write_output({item.batch, item.head, 0}, item.row0);
      else rows.write_part(layout, item.part, item.copy);
    }
  }

 private:
  using Operand = typename HopperRows<C>::Operand;

  const BlockLayout& layout;
  const uint32_t memory;
  const Control control;
  HopperRows<C> rows;
  RingPlace<C::kSlots> place;
  bool ready = false;  // whether the slot there was seen to be full

  // Of a slot: its keys, its values, the bitmap that came with the keys.
  __device__ uint32_t keys_at(int slot) const { return memory + C::kQueryBytes + slot * C::kSlotBytes; }
  __device__ uint32_t values_at(int slot) const { return keys_at(slot) + C::kSlotBytes - C::kTileBytes; }
  __device__ uint32_t words_at(int slot) const { return memory + C::kWordsAt + slot * C::kWordBytes; }

  // All lanes are done with what the barrier guards.
  __device__ void release(uint32_t empty) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty);
  }

  __device__ void await_slot() const {
    if (!ready) barrier_wait(control.full(place.slot), place.parity);
  }

  // To the next slot; what is left of the last one is its number.
  __device__ int advance() {
    const int slot = place.slot;
    place.advance();
    ready = barrier_ended(control.full(place.slot), place.parity);
    return slot;
  }

  // By the bitmap of a slot.
  __device__ __forceinline__ void mask(Scores& s, int slot) {
    rows.mask_scores(s, words_at(slot));
    rows.meet_first_keys(s);
  }

  __device__ void work(int tiles, int full_tiles) {
    rows.start();
    if (tiles == 0) {
      rows.zero_output();
      return;
    }
    rows.load_queries(memory);
    barrier_wait(control.full(place.slot), place.parity);
    if constexpr (C::kPaired) work_paired(tiles, full_tiles);
    else work_halved(tiles, full_tiles);
  }

  // Queries have left shared memory for certain once a product has taken them from registers. To have asked for them is not
  // enough: those loads may stand behind the stores of the last item for longer than the next queries take to come.
  __device__ __forceinline__ void first_tile(Operand& probability, bool partial) {
    Scores s;
    rows.first_scores(s, keys_at(place.slot));
    release(control.query_empty());
    rows.first_softmax(s, partial, words_at(place.slot), probability);
  }

  // ---- slots with the keys of a tile and the values of the tile before ----------------------------------------------------
  // While a tile's scores become probabilities, the product of the last tile's with its values runs, and on into the next step:
  // so operands have two places, and there are two tiles a turn. Whether a tile's probabilities fit is asked for when the next
  // scores are on their way. Waits for products stand where no warp has parted from the others, as PTX demands.

  // A tile whose probabilities nobody looked at so far: the slot of its keys, and their sums.
  struct Unsettled {
    int slot;
    float sum[2];
  };

  __device__ void work_paired(int tiles, int full_tiles) {
    Operand even, odd;
    Unsettled last{place.slot, {0.f, 0.f}};  // the first tile fits
    first_tile(even, full_tiles == 0);
    advance();
#pragma unroll 1
    for (int tile = 1;; tile += 2) {
      if (tile == tiles) return finish(even, last, tiles, full_tiles);
      step(even, odd, last, tile, full_tiles);
      if (tile + 1 == tiles) return finish(odd, last, tiles, full_tiles);
      step(odd, even, last, tile + 1, full_tiles);
    }
  }

  __device__ __forceinline__ void step(Operand& before, Operand& after, Unsettled& last, int tile, int full_tiles) {
    await_slot();
    Scores s;
    rows.start_scores(s, keys_at(place.slot));
    products_wait<1>();  // that of the values before the last tile's
    settle(before, last, tile > full_tiles);
    rows.start_output(values_at(place.slot), before, tile == 1);
    last.slot = advance();
    products_wait<1>();
    pin_registers(s);
    if (tile >= full_tiles) mask(s, last.slot);
    rows.exponentials(s, last.sum);
    rows.pack(s, after);
  }

  // The last tile's probabilities are kept, or made again, and its slot is free.
  __device__ __forceinline__ void settle(Operand& probability, const Unsettled& last, bool partial) {
    pin_registers(rows.o);
    if (!rows.add(last.sum)) rows.repeat_tile(keys_at(last.slot), partial, words_at(last.slot), probability);
    release(control.empty(last.slot));
  }

  __device__ __forceinline__ void finish(Operand& before, const Unsettled& last, int tiles, int full_tiles) {
    products_wait<0>();
    settle(before, last, tiles > full_tiles);
    last_values(before, tiles);
  }

  // The product of the last tile's probabilities with its values.
  __device__ __forceinline__ void last_values(const Operand& probability, int tiles) {
    await_slot();
    rows.start_output(values_at(place.slot), probability, tiles == 1);
    products_wait<0>();
    pin_registers(rows.o);
    release(control.empty(place.slot));
    place.advance();
  }

  // ---- slots with keys or values --------------------------------------------------------------------------------------------
  // There are too few to hold the last tile's any longer: a tile is settled before the next one. Both slots of a step are awaited
  // before its products are started, so that nothing stands between the two.

  __device__ void work_halved(int tiles, int full_tiles) {
    Operand probability;
    first_tile(probability, full_tiles == 0);
    release(control.empty(place.slot));
    place.advance();
    barrier_wait(control.full(place.slot), place.parity);
    bool both = false;  // whether the values' slot was seen to be full, too
#pragma unroll 1
    for (int tile = 1; tile < tiles; ++tile) {
      const int keys = place.slot;
      place.advance();
      const int values = place.slot;
      if (!both) barrier_wait(control.full(values), place.parity);
      place.advance();
      Scores s;
      rows.start_scores(s, keys_at(keys));
      rows.start_output(values_at(values), probability, tile == 1);
      products_wait<1>();
      pin_registers(s);
      if (tile >= full_tiles) mask(s, keys);
      float sum[2];
      rows.exponentials(s, sum);
      const bool fits = rows.add(sum);
      pin_registers(s);
      // Also a branch, without which the compiler would move the wait for products to in front of the exponentials.
      barrier_wait(control.full(place.slot), place.parity);
      both = full_after();
      products_wait<0>();
      pin_registers(rows.o);
      if (fits) rows.pack(s, probability);
      else rows.repeat_tile(keys_at(keys), tile >= full_tiles, words_at(keys), probability);
      release(control.empty(keys));
      release(control.empty(values));
    }
    ready = true;
    last_values(probability, tiles);
  }

  // Whether the slot after the one at `place` is full.
  __device__ bool full_after() const {
    RingPlace<C::kSlots> next = place;
    next.advance();
    return barrier_ended(control.full(next.slot), next.parity);
  }
};

}  // namespace stof::cuda
