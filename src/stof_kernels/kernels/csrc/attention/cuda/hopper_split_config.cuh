// Block-wise attention on Hopper for short calls: numbers of one instantiation, and where what lies in shared memory.
#pragma once

#include "hopper_cluster.cuh"
#include "hopper_config.cuh"

namespace stof::cuda {

template <typename T_, int kDim_, int kGroups_, int kStages_, int kBlocksPerUnit_, bool kShares_>
struct HopperSplitConfig {
  using T = T_;
  static constexpr int kDim = kDim_;        // head dim, padded: 64 or 128
  static constexpr int kGroups = kGroups_;  // warpgroups, which share the key tiles of an item
  static constexpr int kStages = kStages_;  // key tiles that a warpgroup holds
  static constexpr int kBlocksPerUnit = kBlocksPerUnit_;  // blocks that a multiprocessor has room for
  static constexpr bool kShares = kShares_;  // blocks are launched in clusters of two, which share the longest items

  static constexpr int kThreads = kGroups * 128;
  static constexpr int kRows = 64;  // query tile
  static constexpr int kKeys = 64;  // key tile
  static constexpr int kRun = 16;
  static constexpr int kLeastShared = 4;           // key tiles; shorter lists stay with one block
  static constexpr int kBlocks = kDim / 64;        // blocks of 64 dims, whose rows of 128 bytes are swizzled
  static constexpr int kBlockBytes = kKeys * 128;
  static constexpr int kQueryBlockBytes = kBlockBytes;
  static constexpr int kTileBytes = kBlocks * kBlockBytes;  // queries, keys or values
  static constexpr int kWordBytes = kRows * 8;              // bitmap of one tile
  static constexpr int kColumns = 64;                       // of a warpgroup's tiles: their runs wait in shared memory
  // Results are joined row by row, as floats in shared memory; rows lie so that accumulators are stored without bank conflicts.
  // What is left between them holds a row's maximum and sum.
  static constexpr int kResultRowBytes = kDim * 4 + 32;
  static constexpr int kChunks = kDim / 8;         // of 8 dims, which a thread joins
  static constexpr int kSharedRows = kRows / 2;    // rows that a block joins of an item that two share

  // A warpgroup's shared memory: its slots first, keys and values of a stage side by side. Its results lie where they were.
  static constexpr int kWordsAt = kStages * 2 * kTileBytes;
  static constexpr int kColumnsAt = kWordsAt + kStages * kWordBytes;
  static constexpr int kBarriersAt = kColumnsAt + kColumns * 16;
  static constexpr int kGroupBytes = (kBarriersAt + kStages * 4 * 8 + 8 + 1023) / 1024 * 1024;
  // A block's: its warpgroups', queries, what the other block of a cluster sends, the item.
  static constexpr int kQueriesAt = kGroups * kGroupBytes;
  static constexpr int kInboxAt = kQueriesAt + kTileBytes;
  static constexpr int kInboxBytes = kShares ? kSharedRows * (kDim * 4 + 8) : 0;
  static constexpr int kItemAt = kInboxAt + kInboxBytes;
  static constexpr int kSharedBytes = kItemAt + 64 + 1024;  // the last to align the first

  static_assert(kSharedBytes <= 227 * 1024 && kBlocksPerUnit * (kSharedBytes + 1024) <= 228 * 1024, "shared memory");
  static_assert(kRows * kResultRowBytes <= kWordsAt, "results lie where tiles were");
  static_assert(kRows * kChunks % kThreads == 0, "threads share rows evenly");
};

// What a block knows of its item, and barriers of the block: where its threads find them, for nobody has registers for them.
template <class C>
struct HopperSplitItem {
  uint32_t memory;  // of the block

  // {first row, batch, head, head of keys}, {first key tile, what a tile's number is added to for its bitmap, part or -1, copy}.
  __device__ uint32_t where() const { return memory + C::kItemAt; }
  __device__ int4 place() const { return load_shared4(where()); }
  __device__ int4 more() const { return load_shared4(where() + 16); }

  __device__ uint32_t tiles_at() const { return where() + 32; }
  // Its key tiles, and how many warpgroups they are dealt to.
  __device__ int2 tiles() const { return load_shared2(tiles_at()); }
  __device__ bool is_shared() const { return C::kShares && tiles().y > C::kGroups; }

  __device__ uint32_t query_full() const { return where() + 40; }
  __device__ uint32_t inbox_full() const { return where() + 48; }
};

}  // namespace stof::cuda
