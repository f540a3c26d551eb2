// Which tile of which sequence a block works on: tiles of all sequences in one list, walked by a persistent grid.
#pragma once

#include "device.cuh"

namespace stof::bytetransformer {

struct GroupedTile {
  int problem;  // sequence
  int index;    // tile within it
  int length;   // tokens of the sequence
};

// A sequence has tiles of kTile rows, in each head, and of as many columns if square. All lanes of a warp call `find` alike,
// with ascending numbers. A warp looks at 32 sequences at once.
template <int kTile, bool kSquare>
class TileVisitor {
 public:
  __device__ __forceinline__ TileVisitor(const int* lengths, int problems, int heads)
      : lengths_(lengths), problems_(problems), heads_(heads) {
    inspect();
  }

  // False when the list has no such tile.
  __device__ __forceinline__ bool find(int tile, GroupedTile& found) {
    while (tile >= before_ + shuffle_from(through_, 31)) {
      before_ += shuffle_from(through_, 31);
      first_ += 32;
      if (first_ >= problems_) return false;
      inspect();
    }
    const int passed = count_bits(ballot(before_ + through_ <= tile));
    found.problem = first_ + passed;
    found.index = tile - before_ - shuffle_from(through_ - count_, passed);
    found.length = shuffle_from(length_, passed);
    return true;
  }

 private:
  __device__ __forceinline__ void inspect() {
    const int lane = threadIdx.x % 32, problem = first_ + lane;
    length_ = problem < problems_ ? lengths_[problem] : 0;
    const int down = ceil_div(length_, kTile);
    count_ = heads_ * down * (kSquare ? down : 1);
    through_ = count_;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int below = shuffle_up(through_, lanes);
      if (lane >= lanes) through_ += below;
    }
  }

  const int* lengths_;
  int problems_, heads_;
  int first_ = 0, before_ = 0;           // first sequence of the window, tiles ahead of it
  int length_ = 0, count_ = 0, through_ = 0;  // this lane's sequence: tokens, tiles, tiles of the window up to and with it
};

// Four registers of each of the four lanes of a quad, transposed: register j of lane t becomes register t of lane j.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&v)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t other = shuffle_xor(upper ? v[low] : v[high], step);
      if (upper) v[low] = other;
      else v[high] = other;
    }
  }
}

}  // namespace stof::bytetransformer
