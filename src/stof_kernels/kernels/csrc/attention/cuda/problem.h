// What the CUDA attention kernels are told: plain structs, no torch, so that device code compiles fast and stands alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace stof::cuda {

// Division by a number known at launch: a multiply and a shift, where a hardware-less integer division costs some thirty
// instructions. Exact for 0 <= n < 2**31 and 1 <= divisor < 2**31.
struct FastDivisor {
  uint32_t divisor, factor, shift;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d), factor(0), shift(0) {
    while (shift < 31 && (1u << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), factor) + static_cast<uint32_t>(n)) >> shift);
  }
#endif
};

// Element strides of a (batch, head, row, dim) tensor whose last dimension is dense.
struct Strides {
  int64_t batch, head, row;
};

struct BiasView {
  const void* data;
  int64_t batch, head, row, key;  // element strides, 0 where broadcast
  bool is_float;                  // fp32; otherwise the dtype of q
};

// One call of sparse_attention, layout aside.
struct Problem {
  const void *q, *k, *v;
  void* out;   // (batch, q_len, q_heads, head_dim) memory
  float* lse;  // (batch, q_heads, q_len) or null
  Strides q_stride, k_stride, v_stride, out_stride;
  BiasView bias;
  const int64_t* counts;  // the mask's counts; counts[3] != 0: over capacity
  int batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  int mask_batch, mask_heads;
  FastDivisor heads;   // q_heads
  FastDivisor planes;  // mask_heads
  FastDivisor shared;  // q_heads / kv_heads
  float scale_log2;    // |scale| * log2(e), never 0
  uint32_t q_flip;     // sign bits to flip in a pair of q elements: a negative scale is moved into q
  bool is_bf16;
};

// Ints of a work item of the block-wise layout:
// {query tile of the plane, first key tile, key tiles, part or -1, leading full tiles, first bitmap slot, plane, 0, the first
//  key tile's four runs}
constexpr int kItemInts = 12;
// Ints of the layout's header: {items, parts, combines, key tiles, bitmap slots, longest item, overflow, leading items: those
//  more than twice as long as the mean}
constexpr int kHeaderInts = 8;
// Ints of a combine entry: {query tile of the plane, first part, parts, plane}
constexpr int kCombineInts = 4;

struct BlockLayout {
  const int* header;
  const int* combines;
  const int* items;
  const int* col;        // (key tiles, 4) run of 16 keys or -1
  const uint32_t* bits;  // (slots, 2 * q_tile) in accumulator order
  int q_tile;
  int q_tiles;           // per mask plane
  int item_limit;        // items launched per copy of the mask: the exact number, or the capacity
  int combine_limit;
  bool exact;            // item_limit is exact, the layout is known to fit and was complete before this call was launched
  int copies;            // (batch, head) pairs that share one mask plane
  // Copies go in groups whose keys fit in L2; blocks of a whole group, copies of a whole and of the last group.
  FastDivisor group_blocks, group_copies, last_copies;
  int* next_unit;        // where blocks that stay count the items they take; null: items are dealt
  float* part_out;       // (parts * copies, q_tile, head_dim)
  float2* part_stat;     // (parts * copies, q_tile): row maximum in log2 units, row sum
};

// Canonical lists, read by the row-wise kernel.
struct CellLists {
  const int *strip_ptr, *cell_col, *cell_slot;
  const uint16_t* cell_bits;
  int strips;  // per plane
};

// Which instantiation of the block-wise kernel runs a layout.
enum class Shape : int {
  kWide = 0,    // 64 query rows, 4 warps of 16
  kLarge = 1,   // 128 query rows
  kSplit = 2,   // 64 query rows, key tiles dealt to groups of 4 warps: short launches
  kHopper = 3,  // sm_90a: 64 query rows a warpgroup, each with an item of its own; its blocks stay
  kHopperPair = 4,   // sm_90a: 128 query rows, two warpgroups that share the keys; its blocks stay
  kHopperSplit = 5,  // sm_90a: 64 query rows, key tiles dealt to the two warpgroups of a block: short calls, many items
  kHopperQuad = 6,   // the same with four, or with the eight of two blocks: few items
};

cudaError_t launch_block_wise(const Problem& problem, const BlockLayout& layout, Shape shape, cudaStream_t stream);
cudaError_t launch_combine(const Problem& problem, const BlockLayout& layout, cudaStream_t stream);
cudaError_t launch_row_wise(const Problem& problem, const CellLists& lists, cudaStream_t stream);
constexpr int kShapes = 7;

// Whether blocks of that shape stay and take one item after the other.
constexpr bool stays(Shape shape) { return shape == Shape::kHopper || shape == Shape::kHopperPair; }

// Up to how many items a multiprocessor these are dealt, and not counted: less than three for each of its sets of warpgroups. So
// few are one group of copies, which dealing needs: of several groups it would give a block the longest of each.
constexpr int most_dealt(Shape shape, int head_dim) { return shape == Shape::kHopperPair ? 3 : head_dim <= 64 ? 8 : 5; }

// Query rows of an item of that shape.
constexpr int query_tile(Shape shape) { return shape == Shape::kLarge || shape == Shape::kHopperPair ? 128 : 64; }

// Whether some instantiation of the shape serves this head dim; every head dim has kWide.
bool has_shape(Shape shape, int head_dim, bool has_bias);

using BlockWiseLauncher = cudaError_t (*)(const Problem&, const BlockLayout&, cudaStream_t);

// One instantiation; the table is generated from kernels/instances.py.
struct BlockWiseEntry {
  Shape shape;
  int dim;  // head dims up to this one
  bool is_bf16, has_bias;
  BlockWiseLauncher launch;
};

extern const BlockWiseEntry kBlockWiseTable[];
extern const int kBlockWiseEntries;

}  // namespace stof::cuda
