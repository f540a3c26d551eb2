// Sizes of the Hopper kernel, and what its two roles tell each other through shared memory.
//
// Warpgroups multiply (wgmma) what a producer warp brings by bulk tensor copies (TMA). A block holds sets of warpgroups; it
// stays and works through items. A set shares one work item at a time, 64 query rows a warpgroup, and a ring of slots; one warp
// of the producer warpgroup serves each set and runs ahead of it, into the next item too. A slot is paired: it has what a step
// needs, the keys of a packed tile and the values of the tile before, behind one barrier. Where three of those have no room it
// has the one or the other. Queries and probabilities are operands in registers.
#pragma once

#include "hopper_ptx.cuh"

namespace stof::cuda {

template <typename T_, int kDim_, int kSets_, int kShare_, int kSlots_, int kRegisters_, bool kPaired_>
struct HopperConfig {
  using T = T_;
  static constexpr int kDim = kDim_;              // head dim, padded: 64 or 128
  static constexpr int kSets = kSets_;            // of warpgroups, each with items of its own
  static constexpr int kShare = kShare_;          // warpgroups of a set
  static constexpr int kSlots = kSlots_;          // of a set's ring
  static constexpr int kRegisters = kRegisters_;  // of a thread that multiplies
  static constexpr bool kPaired = kPaired_;       // keys of a tile and values of the tile before in one slot

  static constexpr int kRows = kShare * 64;  // query tile
  static constexpr int kKeys = 64;           // key tile
  static constexpr int kRun = 16;
  static constexpr int kBlocks = kDim / 64;          // blocks of 64 dims, whose rows of 128 bytes are swizzled
  static constexpr int kBlockBytes = kKeys * 128;    // of one block of a tile
  static constexpr int kTileBytes = kBlocks * kBlockBytes;
  static constexpr int kSlotBytes = (kPaired ? 2 : 1) * kTileBytes;  // keys, then values
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
  static_assert(kSlots >= (kPaired ? 3 : 4), "of the last step, of this one and of the next");
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
    store_shared(base + lap * 32, make_int4(i.tiles, i.full_tiles, i.row0, i.part));
    store_shared(base + lap * 32 + 16, make_int4(i.batch, i.head, i.copy, 0));
  }

  // What the work on an item needs, and the rest.
  __device__ __forceinline__ int2 lengths(uint32_t lap) const { return load_shared2(base + lap * 32); }

  __device__ __forceinline__ HopperItem get(uint32_t lap) const {
    const int4 work = load_shared4(base + lap * 32), place = load_shared4(base + lap * 32 + 16);
    return {work.z, work.x, work.y, work.w, place.x, place.y, place.z};
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

}  // namespace stof::cuda
