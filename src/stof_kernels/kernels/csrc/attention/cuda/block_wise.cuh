// Block-wise attention on mma.sync: one work item is a tile of queries and a list of key tiles, each packed from four runs
// of 16 keys. Full tiles run without mask code; a partial tile's bitmap is one word per thread and 16 rows, laid out in
// accumulator order. Queries and probabilities stay in registers, keys and values pass through a cp.async ring.
#pragma once

#include "common.cuh"

namespace stof::cuda {

constexpr int kTileKeys = 64;  // keys of a packed tile
constexpr int kRun = 16;       // consecutive keys of one run

template <typename T_, int kDim_, int kWarps_, int kBlocks_, int kKeys_, int kStages_, int kGroups_, bool kBias_>
struct BlockConfig {
  using T = T_;
  static constexpr int kDim = kDim_;        // head dim, padded
  static constexpr int kWarps = kWarps_;    // warps of a group
  static constexpr int kBlocks = kBlocks_;  // 16-row blocks of a warp
  static constexpr int kKeys = kKeys_;      // keys of one pipeline step: a tile, or half of one for wide heads
  static constexpr int kStages = kStages_;
  static constexpr int kGroups = kGroups_;  // groups of warps that share the queries and deal the key tiles among them
  static constexpr bool kBias = kBias_;

  static constexpr int kRows = kWarps * kBlocks * 16;
  static constexpr int kThreads = kWarps * 32;  // of a group
  static constexpr int kSteps = kTileKeys / kKeys;
  static constexpr int kChunks = kDim / 8;  // 16-byte chunks of a row
  static constexpr int kRowBytes = kDim * 2;
  // Wide heads read Q from shared memory again for every product: their registers hold the output.
  static constexpr bool kQueriesInRegisters = kDim <= 128;
  static constexpr int kStageBytes = 2 * kKeys * kRowBytes;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  // Q that is read once waits in the ring's last stage, if it fits there; that stage is filled last.
  static constexpr bool kQueriesInRing = kQueriesInRegisters && kQueryBytes <= kStageBytes;
  static constexpr int kGroupBytes = kStages * kStageBytes + (kQueriesInRing ? 0 : kQueryBytes);
  static constexpr int kSharedBytes = kGroups * kGroupBytes;
  static_assert(kQueryBytes <= kGroupBytes, "the output is staged there");
  static_assert(kGroups == 1 || kThreads * (kBlocks * (kDim / 2 + 4)) * 4 <= kGroupBytes, "a group hands over in its ring");
};

// Rows are stored with their 16-byte chunks permuted, so that the 8 rows of an ldmatrix lie in different banks: chunk c of
// row r is at position c ^ swizzle(r).
template <int kChunks>
__host__ __device__ constexpr int swizzle(int row) {
  return kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;
}

template <int kChunks>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * (kChunks * 16) + (chunk ^ swizzle<kChunks>(row)) * 16;
}

// Offset `even` (an even number) chunks further in the row of `offset`: the low bits are xored, the others added.
template <int kChunks>
__device__ __forceinline__ uint32_t skip_chunks(uint32_t offset, int even) {
  constexpr int kMask = kChunks % 8 == 0 ? 7 : 3;
  return (offset ^ ((even & kMask) * 16)) + (even & ~kMask) * 16;
}

template <class C>
class BlockWise {
  using T = typename C::T;

 public:
  __device__ BlockWise(const Problem& problem, const BlockLayout& layout, uint32_t ring, int group)
      : p(problem), layout(layout), ring(ring), group(group) {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // volatile: kept in a register, not read again in the loop
    lane = thread & 31;
    warp = C::kGroups == 1 ? thread >> 5 : (thread >> 5) % C::kWarps;
    key_offset = chunk_offset<C::kChunks>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    value_offset = chunk_offset<C::kChunks>(lane & 15, lane >> 4);
    copy_offset = chunk_offset<C::kChunks>(warp * kWarpKeys + lane / C::kChunks, lane % C::kChunks);
  }

  __device__ void run(const int* item);
  __device__ void merge_groups(float* shared);
  __device__ void write_output(unsigned char* shared);
  __device__ void write_part(int part, int copy);

  float o[C::kBlocks][C::kDim / 8][4];
  float row_max[C::kBlocks][2];
  float row_sum[C::kBlocks][2];
  Instance at;
  int row0;  // first query of the tile

 private:
  const Problem& p;
  const BlockLayout& layout;
  const uint32_t ring;  // shared memory of this group
  const int group;
  int lane, warp;
  // Of this lane's row in a run, for ldmatrix. The orders differ, because a product takes its two registers of B side by
  // side: for keys the low and high chunk of 8 keys, for values the low and high keys of a chunk.
  uint32_t key_offset, value_offset;
  uint32_t copy_offset;         // of this lane's first copy in a stage
  const char *k, *v;            // of this head
  uint32_t k_offset, v_offset;  // of this lane's first row and chunk in a run
  int first_tile, full_tiles;  // of the item: its first key tile, and how many lead that need no mask
  int first_slot;

  static constexpr int kWarpKeys = C::kKeys / C::kWarps;                    // keys of a step that a warp loads
  static constexpr int kWarpRuns = kWarpKeys > kRun ? kWarpKeys / kRun : 1;
  static constexpr int kRunKeys = kWarpKeys > kRun ? kRun : kWarpKeys;      // keys of each of its runs
  static constexpr int kCopies = kRunKeys * C::kChunks / 32;                // 16-byte copies of a lane per run
  static_assert(kRunKeys * C::kChunks % 32 == 0, "lanes share a run evenly");
  // Lanes take whole rows, a power of two of them at a time: each copy of a lane is a fixed distance from its last.
  static constexpr bool kWholeRows = 32 % C::kChunks == 0;
  static constexpr int kCopyRows = kWholeRows ? 32 / C::kChunks : 0;

  struct Runs {
    int col[kWarpRuns];
  };

  // Byte offsets inside one head fit 32 bits (the caller packs what does not): registers are short here.
  static __device__ uint32_t row_bytes(const Strides& stride) { return static_cast<uint32_t>(stride.row) * sizeof(T); }
  __device__ const char* head_base(const void* data, const Strides& stride, int head) const {
    return static_cast<const char*>(data) + (at.batch * stride.batch + head * stride.head) * sizeof(T);
  }

  __device__ uint32_t stage(int s) const { return ring + s * C::kStageBytes; }
  __device__ uint32_t query_base() const {
    return C::kQueriesInRing ? stage(C::kStages - 1) : ring + C::kStages * C::kStageBytes;
  }
  __device__ int own_tile(int step) const { return group + step / C::kSteps * C::kGroups; }  // relative to the item
  __device__ void sync() const {
    if (C::kGroups == 1) __syncthreads();
    else group_barrier<C::kThreads>(group + 1);
  }

  __device__ Runs runs_of(int step) const;
  __device__ void load_step(int step, const Runs& runs) const;
  __device__ void load_queries() const;
  __device__ void query_fragment(uint32_t (&fragment)[4], int block, int k) const;
  __device__ void words_of(int step, uint32_t (&words)[C::kBlocks]) const;
  __device__ void scores(float (&s)[C::kBlocks][C::kKeys / 8][4], uint32_t keys) const;
  __device__ void mask_scores(float (&s)[C::kBlocks][C::kKeys / 8][4], const uint32_t (&words)[C::kBlocks], int step) const;
  __device__ void softmax(float (&s)[C::kBlocks][C::kKeys / 8][4]);
  __device__ void accumulate(const float (&s)[C::kBlocks][C::kKeys / 8][4], uint32_t values);
  __device__ void finish_rows();

  uint32_t q[C::kQueriesInRegisters ? C::kBlocks : 1][C::kQueriesInRegisters ? C::kDim / 16 : 1][4];
};

// Columns of the runs that this warp loads in a step; -1: none.
template <class C>
__device__ __forceinline__ typename BlockWise<C>::Runs BlockWise<C>::runs_of(int step) const {
  Runs runs;
  const int* col = layout.col + ((first_tile + own_tile(step)) * 4u + (step % C::kSteps * C::kKeys + warp * kWarpKeys) / kRun);
#pragma unroll
  for (int r = 0; r < kWarpRuns; ++r) runs.col[r] = __ldg(col + r);
  return runs;
}

template <class C>
__device__ __forceinline__ void BlockWise<C>::load_step(int step, const Runs& runs) const {
  const uint32_t base = stage(step % C::kStages);
  const uint32_t k_step = row_bytes(p.k_stride), v_step = row_bytes(p.v_stride);
  const int first_row = lane / C::kChunks, first_chunk = lane % C::kChunks;
#pragma unroll
  for (int r = 0; r < kWarpRuns; ++r) {
    const uint32_t key0 = runs.col[r] * kRun + (warp * kWarpKeys) % kRun;
    const int rows = runs.col[r] < 0 ? 0 : p.kv_len - static_cast<int>(key0);  // that exist; the others become zeros
    const uint32_t from_k = k_offset + key0 * k_step, from_v = v_offset + key0 * v_step;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      int row, chunk;
      uint32_t offset;
      if (kWholeRows) {
        row = first_row + j * kCopyRows, chunk = first_chunk;
        offset = (copy_offset ^ swizzle<C::kChunks>(j * kCopyRows) * 16) + (r * kRun + j * kCopyRows) * C::kRowBytes;
      } else {
        row = (lane + 32 * j) / C::kChunks, chunk = (lane + 32 * j) % C::kChunks;
        offset = chunk_offset<C::kChunks>(warp * kWarpKeys + r * kRun + row, chunk);
      }
      const uint32_t rows_on = row - first_row;
      const int chunks_on = chunk - first_chunk;
      const bool valid = row < rows && chunk * 8 < p.head_dim;
      copy_async16(base + offset, k + (from_k + rows_on * k_step + chunks_on * 16), valid);
      copy_async16(base + offset + C::kKeys * C::kRowBytes, v + (from_v + rows_on * v_step + chunks_on * 16), valid);
    }
  }
}

template <class C>
__device__ __forceinline__ void BlockWise<C>::load_queries() const {
  const char* q_base = head_base(p.q, p.q_stride, at.head);
#pragma unroll
  for (int j = 0; j < C::kRows * C::kChunks / C::kThreads; ++j) {
    const int c = warp * 32 + lane + C::kThreads * j;
    const int row = c / C::kChunks, chunk = c % C::kChunks;
    const bool valid = row0 + row < p.q_len && chunk * 8 < p.head_dim;
    copy_async16(query_base() + chunk_offset<C::kChunks>(row, chunk),
                 q_base + (static_cast<uint32_t>(row0 + row) * row_bytes(p.q_stride) + chunk * 16), valid);
  }
}

template <class C>
__device__ __forceinline__ void BlockWise<C>::query_fragment(uint32_t (&fragment)[4], int block, int k) const {
  const int row = (warp * C::kBlocks + block) * 16 + (lane & 15);
  load_matrices(fragment, query_base() + chunk_offset<C::kChunks>(row, 2 * k + (lane >> 4)));
#pragma unroll
  for (int i = 0; i < 4; ++i) fragment[i] ^= p.q_flip;
}

// This thread's bitmap words of a step's tile; all ones for a full tile.
template <class C>
__device__ __forceinline__ void BlockWise<C>::words_of(int step, uint32_t (&words)[C::kBlocks]) const {
  const int partial = own_tile(step) - full_tiles;
  const uint32_t* slot = layout.bits + static_cast<uint32_t>(first_slot + partial) * (C::kRows * 2u);
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m)
    words[m] = partial < 0 ? 0xffffffffu : __ldg(slot + (warp * C::kBlocks + m) * 32 + lane);
}

template <class C>
__device__ __forceinline__ void BlockWise<C>::scores(float (&s)[C::kBlocks][C::kKeys / 8][4], uint32_t keys) const {
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
#pragma unroll
  for (int k = 0; k < C::kDim / 16; ++k) {
    uint32_t reload[C::kBlocks][4];
    if (!C::kQueriesInRegisters) {
#pragma unroll
      for (int m = 0; m < C::kBlocks; ++m) query_fragment(reload[m], m, k);
    }
    const uint32_t offset = keys + skip_chunks<C::kChunks>(key_offset, 2 * k);
#pragma unroll
    for (int n = 0; n < C::kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, offset + n * 16 * C::kRowBytes);
#pragma unroll
      for (int m = 0; m < C::kBlocks; ++m) {
        const uint32_t* a = C::kQueriesInRegisters ? q[m][k] : reload[m];
        Element<T>::multiply(s[m][2 * n], a, b[0], b[1]);
        Element<T>::multiply(s[m][2 * n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Removed positions become -inf; with a bias, scores are brought to log2 units here.
template <class C>
__device__ __forceinline__ void BlockWise<C>::mask_scores(float (&s)[C::kBlocks][C::kKeys / 8][4],
                                                          const uint32_t (&words)[C::kBlocks], int step) const {
  const int shift = step % C::kSteps * (C::kKeys / 2);
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m) {
    const uint32_t word = words[m] >> shift;
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) {
      int key = 0;
      if (C::kBias) {
        const int run = (step % C::kSteps * C::kKeys) / kRun + n / 2;
        key = __ldg(layout.col + (first_tile + own_tile(step)) * 4u + run) * kRun + (n & 1) * 8 + (lane & 3) * 2;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool kept = (word >> (n * 4 + e)) & 1u;
        if (!C::kBias) {
          s[m][n][e] = kept ? s[m][n][e] : -INFINITY;
        } else {
          const int row = row0 + (warp * C::kBlocks + m) * 16 + (lane >> 2) + (e >> 1) * 8;
          float value = -INFINITY;
          if (kept && row < p.q_len) {
            value = s[m][n][e] * p.scale_log2 +
                    bias_log2<T>(p.bias, at.batch * p.bias.batch + at.head * p.bias.head + row * p.bias.row +
                                             (key + (e & 1)) * p.bias.key);
          }
          s[m][n][e] = value;
        }
      }
    }
  }
}

// Online softmax: scores become probabilities relative to the running maximum, sums and outputs are rescaled to it.
template <class C>
__device__ __forceinline__ void BlockWise<C>::softmax(float (&s)[C::kBlocks][C::kKeys / 8][4]) {
  const float scale = C::kBias ? 1.f : p.scale_log2;
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < C::kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(top, row_max[m][r]);
      // While a row has kept nothing, 0 stands in for its maximum so that no inf - inf arises.
      const float offset = top == -INFINITY ? 0.f : top * scale;
      factor[r] = exp2_fast(fmaf(row_max[m][r], scale, -offset));
      row_max[m][r] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[m][n][e] = exp2_fast(fmaf(s[m][n][e], scale, -offset));
          sum += s[m][n][e];
        }
      row_sum[m][r] = fmaf(row_sum[m][r], factor[r], sum);
    }
    // Maxima settle after a few tiles; then a warp skips the rescaling.
    if (!__all_sync(0xffffffffu, factor[0] == 1.f && factor[1] == 1.f)) {
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][n][e] *= factor[e >> 1];
    }
  }
}

template <class C>
__device__ __forceinline__ void BlockWise<C>::accumulate(const float (&s)[C::kBlocks][C::kKeys / 8][4], uint32_t values) {
#pragma unroll
  for (int k = 0; k < C::kKeys / 16; ++k) {
    uint32_t a[C::kBlocks][4];
#pragma unroll
    for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = Element<T>::pack(s[m][2 * k + (i >> 1)][2 * (i & 1)], s[m][2 * k + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
    for (int n = 0; n < C::kDim / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, values + k * 16 * C::kRowBytes + skip_chunks<C::kChunks>(value_offset, 2 * n));
#pragma unroll
      for (int m = 0; m < C::kBlocks; ++m) {
        Element<T>::multiply(o[m][2 * n], a[m], b[0], b[1]);
        Element<T>::multiply(o[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace stof::cuda
