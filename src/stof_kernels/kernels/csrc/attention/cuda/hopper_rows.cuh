// 64 query rows of a warpgroup on Hopper: products with tiles in shared memory, masking, softmax, output. What the kernels that
// use wgmma have in common; they decide which tiles come when.
#pragma once

#include "common.cuh"
#include "hopper_ptx.cuh"

namespace stof::cuda {

// C has the element type T and the numbers kDim (padded: a multiple of 64), kKeys (of a tile: 64), kBlocks (of 64 dims),
// kBlockBytes (of a tile's keys or values) and kQueryBlockBytes (of a query tile). A block's rows of 128 bytes lie as the copy
// engine's 128-byte swizzle leaves them. `warp` counts warps of 16 rows in the query tile.
template <class C>
class HopperRows {
  using T = typename C::T;

 public:
  using Scores = float[C::kKeys / 2];
  // Probabilities of a tile as operands: row, row + 8, then the same of the next 8 keys.
  using Operand = uint32_t[C::kKeys / 16][4];

  float o[C::kDim / 2];
  // Of the two rows of a thread: what scores are relative to, in log2 units and negated; sum of the probabilities.
  float shift[2], row_sum[2];

  __device__ __forceinline__ HopperRows(const Problem& p, int warp) : p(p), warp(warp), lane(threadIdx.x & 31) {}

  // Nothing attended to so far. Registers of the output are left alone: the first product writes them.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = kEmpty, row_sum[r] = 0.f;
  }

  // What a row without keys has.
  __device__ __forceinline__ void zero_output() {
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] = 0.f;
  }

  // Queries become operands in registers.
  __device__ void load_queries(uint32_t queries) {
    const int row = warp * 16 + (lane & 15);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int chunk = (k & 3) * 2 + (lane >> 4);
      load_matrices(q[k], queries + k / 4 * C::kQueryBlockBytes + row * 128 + ((chunk ^ (row & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) q[k][i] ^= p.q_flip;
    }
  }

  // Starts the products of queries and the keys at an address.
  __device__ void start_scores(Scores& s, uint32_t from) {
    const uint32_t keys = descriptor_low(from, 0);
    products_begin();
    warpgroup_multiply<T, false, true>(s, q[0], descriptor(keys), 0);
#pragma unroll
    for (int k = 1; k < C::kDim / 16; ++k)
      warpgroup_multiply<T, false, false>(s, q[k], descriptor(keys + (k / 4 * C::kBlockBytes + (k & 3) * 32) / 16), 1);
    products_commit();
  }

  // Starts the product of probabilities and values. `first`: nothing was summed before; registers are not set to zero, which
  // would have to wait for running products.
  __device__ void start_output(uint32_t from, const Operand& probability, bool first) {
    const uint32_t values = descriptor_low(from, C::kBlockBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k)
      warpgroup_multiply<T, true, false>(o, probability[k], descriptor(values + k * 16 * 128 / 16), k > 0 || !first);
    products_commit();
  }

  // Scores of one warp alone, which cannot use the warpgroup's products.
  __device__ __forceinline__ void warp_scores(Scores& s, uint32_t keys) const {
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) s[i] = 0.f;
    int thread = lane;
    asm volatile("" : "+r"(thread));  // so that the loop around this rare path keeps no register for what follows from it
    const int row = (thread & 7) + ((thread >> 4) << 3);
#pragma unroll
    for (int k = 0; k < C::kDim / 16; ++k) {
      const int chunk = (k & 3) * 2 + ((thread >> 3) & 1);
      const uint32_t from = keys + k / 4 * C::kBlockBytes + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
      for (int n = 0; n < C::kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, from + n * 16 * 128);
        Element<T>::multiply(reinterpret_cast<float(&)[4]>(s[n * 8]), q[k], b[0], b[1]);
        Element<T>::multiply(reinterpret_cast<float(&)[4]>(s[n * 8 + 4]), q[k], b[2], b[3]);
      }
    }
  }

  // Removed positions become -inf. `words`: a tile's bitmap, one word a thread in accumulator order.
  __device__ __forceinline__ void mask_scores(Scores& s, uint32_t words) const {
    const uint32_t word = load_shared(words + (warp * 32 + lane) * 4);
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = (word >> i) & 1u ? s[i] : -INFINITY;
  }

  // Scores to probabilities, and their sums, relative to what earlier tiles were relative to. This saves looking for the
  // maximum, and what is kept is as exact, for all sums are relative to the same number, as long as add() finds that it fits.
  __device__ void exponentials(Scores& s, float (&sum)[2]) const {
    float part[2][2];
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) {
      const int r = (i >> 1) & 1;
      s[i] = exp2_fast(fmaf(s[i], p.scale_log2, shift[r]));
      part[r][i & 1] = i < 4 ? s[i] : part[r][i & 1] + s[i];  // the compiler would add the first ones to zero
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = part[r][0] + part[r][1];
  }

  // Adds a tile's sums. False, and nothing added, if some score of the warp is too far above what its row is relative to.
  __device__ bool add(const float (&sum)[2]) {
    const bool fits = __all_sync(0xffffffffu, sum[0] <= kMostSum && sum[1] <= kMostSum);
    if (fits) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row_sum[r] += sum[r];
    }
    return fits;
  }

  // Rows whose first keys are in this tile get their maximum now: nothing was summed that would have to follow it. Behind
  // mask_scores(), for a full tile comes before all partial ones and leaves no row without keys.
  __device__ __forceinline__ void meet_first_keys(const Scores& s) {
    if (!__any_sync(0xffffffffu, shift[0] == kEmpty || shift[1] == kEmpty)) return;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) top[(i >> 1) & 1] = fmaxf(top[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      if (shift[r] == kEmpty && top[r] != -INFINITY) shift[r] = -top[r] * p.scale_log2;
    }
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

  // After exact_softmax(), where a tile was done before.
  __device__ __forceinline__ void rescale_output() {
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) o[i] *= factor[(i >> 1) & 1];
  }

  // The first tile of a list, under whose softmax no product runs: scores, then probabilities.
  __device__ __forceinline__ void first_scores(Scores& s, uint32_t keys) {
    start_scores(s, keys);
    products_wait<0>();
    pin_registers(s);
  }

  __device__ __forceinline__ void first_softmax(Scores& s, bool partial, uint32_t words, Operand& probability) {
    if (partial) mask_scores(s, words);
    exact_softmax(s);
    pack(s, probability);
  }

  // A tile whose scores are far above those before: they were overwritten, and are made again, by each warp alone.
  __device__ __forceinline__ void repeat_tile(uint32_t keys, bool partial, uint32_t words, Operand& probability) {
    Scores s;
    warp_scores(s, keys);
    if (partial) mask_scores(s, words);
    exact_softmax(s);
    pack(s, probability);
    rescale_output();
  }

  // Probabilities to operands that no running product reads.
  __device__ void pack(const Scores& s, Operand& probability) const {
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) probability[k][i] = Element<T>::pack(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
  }

  // The four threads of a row join their sums. From here on `shift` is the maximum that sums are relative to.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
      shift[r] = shift[r] == kEmpty ? -INFINITY : -shift[r];
    }
  }

  // The four threads of a row trade their pairs of columns for whole chunks of 8, so that a store is 16 bytes.
  __device__ void write_output(const Instance& at, int row0) const {
    T* out = static_cast<T*>(p.out) + at.batch * p.out_stride.batch + at.head * p.out_stride.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + warp * 16 + r * 8 + (lane >> 2);
      const bool inside = row < p.q_len;
      const float sum = row_sum[r], scale = sum == 0.f ? 0.f : reciprocal_fast(sum);
#pragma unroll
      for (int c = 0; c < C::kDim / 8; c += 4) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = Element<T>::pack(o[(c + j) * 4 + r * 2] * scale, o[(c + j) * 4 + r * 2 + 1] * scale);
        exchange(words);
        const int chunk = c + (lane & 3);
        if (inside && chunk * 8 < p.head_dim)
          *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * p.out_stride.row + chunk * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (p.lse != nullptr && (lane & 3) == 0 && inside)
        p.lse[lse_index(p, at, row)] = sum == 0.f ? -INFINITY : (shift[r] + log2_fast(sum)) * kLn2;
    }
  }

  // Sums of a part of a query tile whose key list was cut, joined later by the combine kernel.
  __device__ void write_part(const BlockLayout& layout, int part, int copy) const {
    const int64_t first = (static_cast<int64_t>(part) * layout.copies + copy) * layout.q_tile;
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

 private:
  const Problem& p;
  const int warp, lane;
  uint32_t q[C::kDim / 16][4];
  float factor[2];

  // Sum of a thread's probabilities of one row and tile: up to here each of them fits the operand's type.
  static constexpr float kMostSum = 32768.f;
  // Shift of a row with nothing to attend so far: any score becomes infinite, and the sum shows it.
  static constexpr float kEmpty = 3e38f;

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
};

}  // namespace stof::cuda
