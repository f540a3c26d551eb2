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
      rows.load_queries(memory);
      release(control.query_empty());
      work(lengths.x, lengths.y);
      rows.finish();
      const HopperItem item = control.get(lap);
      if (item.part < 0) rows.write_output({item.batch, item.head, 0}, item.row0);
      else rows.write_part(layout, item.part, item.copy);
    }
  }

 private:
  const BlockLayout& layout;
  const uint32_t memory;
  const Control control;
  HopperRows<C> rows;
  RingPlace<C::kSlots> place;

  __device__ uint32_t slot_at(int slot) const { return memory + C::kQueryBytes + slot * C::kSlotBytes; }
  __device__ uint32_t words_at(int slot) const { return memory + C::kWordsAt + slot * C::kWordBytes; }

  // All lanes are done with what the barrier guards.
  __device__ void release(uint32_t empty) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty);
  }

  __device__ void release(uint32_t empty, uint32_t other) const {
    release(empty);
    if ((threadIdx.x & 31) == 0) barrier_arrive(other);
  }

  // While a tile's scores become probabilities, the product of the last tile's with its values runs.
  __device__ void work(int tiles, int full_tiles) {
    rows.start();
    if (tiles == 0) {
      rows.zero_output();
      return;
    }
    barrier_wait(control.full(place.slot), place.parity);
    rows.first_tile(slot_at(place.slot), full_tiles == 0, words_at(place.slot));
    release(control.empty(place.slot));
    place.advance();
    bool ready = barrier_ended(control.full(place.slot), place.parity);
#pragma unroll 1
    for (int tile = 1; tile < tiles; ++tile) {
      const int keys = place.slot;
      if (!ready) barrier_wait(control.full(keys), place.parity);
      Scores s;
      rows.start_scores(s, slot_at(keys));
      place.advance();
      const int values = place.slot;
      barrier_wait(control.full(values), place.parity);
      rows.start_output(slot_at(values), tile == 1);
      place.advance();
      ready = barrier_ended(control.full(place.slot), place.parity);
      products_wait<1>();
      pin_registers(s);
      if (tile >= full_tiles) rows.mask_scores(s, words_at(keys));
      if (rows.softmax(s)) {
        pin_registers(s);
        products_wait<0>();
        pin_registers(rows.o);
        rows.pack(s);
      } else {
        products_wait<0>();
        pin_registers(rows.o);
        rows.repeat_tile(slot_at(keys), tile >= full_tiles, words_at(keys));
      }
      release(control.empty(keys), control.empty(values));
    }
    barrier_wait(control.full(place.slot), place.parity);
    rows.start_output(slot_at(place.slot), tiles == 1);
    products_wait<0>();
    pin_registers(rows.o);
    release(control.empty(place.slot));
    place.advance();
  }
};

}  // namespace stof::cuda
