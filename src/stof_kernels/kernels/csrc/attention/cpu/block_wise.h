// block_wise: 16 queries against chunks of listed key cells, both products as register tiles.
//
// Per chunk of up to kMaxChunkCells listed cells, neighbours or not: S = Q K^T into a buffer; bias, mask and
// the running maximum; P = exp(S - max); O = O * alpha + P V. Only cells with a bitmap run mask code.
//
// In a cell that is listed, every value row is multiplied, by a weight of 0 where the mask removes the pair:
// a NaN or infinite value there reaches the result, as it does in a dense softmax(S) V.
#pragma once

#include "pack.h"
#include "rows.h"
#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

// A register tile holds kTileRows x kTileVecs accumulators: with 32 registers of 16 lanes, 8 x 2 needs 10
// loads for 16 multiply-adds and leaves room for the operands; with 16 registers, 4 x 2 does.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 2;

// Row stride of the score buffer: not a multiple of 1 KiB, which would put the rows of a tile into the same
// cache sets.
constexpr int kScoreStride = kMaxChunkCells * kCell + kCell;

// Dot products are summed in groups of so many dims: the rounding error of one long fp32 sum would reach 2e-5
// at dim 256 with scores of 60.
constexpr int64_t kDotGroup = 32;

struct Workspace {
  alignas(64) float q[256 * kCell];           // [dim][16 queries], scaled
  alignas(64) float s[kCell * kScoreStride];  // scores, then weights, of one chunk
  alignas(64) float o[kCell * 256];           // [16 queries][padded dim]
  alignas(64) float max[kCell], base[kCell], alpha[kCell];
  Vec sum[kCell];
};

// Queries of a strip to [dim][16], scaled; those past the last query become zeros.
template <typename T>
static void load_queries(const Problem& p, const Strip& strip, int rows, float* q) {
  const T* from = row_base<T>(p.q, strip.b, strip.h, strip.index * kCell);
  const int64_t d =
      rows == kCell && p.q.stride[3] == 1 ? transpose_rows(from, p.q.stride[2], p.dim, q, p.scale) : 0;
  const int64_t stride = p.q.stride[2], step = p.q.stride[3];
  for (int64_t i = d; i < p.dim; ++i) {
    for (int r = 0; r < kCell; ++r)
      q[i * kCell + r] = r < rows ? widen(from[r * stride + i * step]) * p.scale : 0.0f;
  }
}

// q . k for kTileRows queries and kVecs vectors of keys; vector i is read from panel[i] and goes to s +
// to[i].
template <int kVecs>
STOF_INLINE void score_tile(const float* q, const float* const (&panel)[kVecs], const int (&to)[kVecs],
                            int64_t dim, float* s) {
  for (int64_t first = 0; first < dim; first += kDotGroup) {
    const int64_t last = first + kDotGroup < dim ? first + kDotGroup : dim;
    Vec acc[kTileRows][kVecs] = {};
    for (int64_t d = first; d < last; ++d) {
      Vec key[kVecs];
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) key[i] = load(panel[i] + d * kCell);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec query = splat(q[d * kCell + r]);
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) acc[r][i] += query * key[i];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        float* at = s + r * kScoreStride + to[i];
        store(at, first == 0 ? acc[r][i] : load(at) + acc[r][i]);
      }
    }
  }
}

// Scores of `count` cells for the first `rows` queries of the strip (rounded up to whole tiles).
STOF_INLINE void scores(const Problem& p, const float* q, const int32_t* col, int count, KeyPanels keys,
                        int rows, float* s) {
  const int64_t panel_size = p.dim * kCell;
  const int vecs = count * kCellVecs;
  int i = 0;
  for (; i + kTileVecs <= vecs; i += kTileVecs) {
    const float* panel[kTileVecs];
    int to[kTileVecs];
    for (int j = 0; j < kTileVecs; ++j) {
      const int cell = (i + j) / kCellVecs, part = (i + j) % kCellVecs * kLanes;
      panel[j] = keys.data + col[cell] * panel_size + part;
      to[j] = cell * kCell + part;
    }
    for (int r = 0; r < rows; r += kTileRows)
      score_tile<kTileVecs>(q + r, panel, to, p.dim, s + r * kScoreStride);
  }
  for (; i < vecs; ++i) {
    const int cell = i / kCellVecs, part = i % kCellVecs * kLanes;
    const float* const panel[1] = {keys.data + col[cell] * panel_size + part};
    const int to[1] = {cell * kCell + part};
    for (int r = 0; r < rows; r += kTileRows) score_tile<1>(q + r, panel, to, p.dim, s + r * kScoreStride);
  }
}

// Adds the bias of one row to the scores of one cell; -inf wins over any score. Rows of the bias end at
// kv_len, so the last cell is read element by element, and only where `word` keeps something.
STOF_INLINE void add_bias(const Problem& p, BiasRow bias, int64_t first_key, int32_t word, float* s) {
  if (bias.step == 1 && first_key + kCell <= p.kv_len) {
    for (int i = 0; i < kCell; i += kLanes) {
      const Vec value = bias.vec(first_key + i);
      store(s + i, value == -kInf ? splat(-kInf) : load(s + i) + value);
    }
    return;
  }
  for (int i = 0; i < kCell; ++i) {
    if (!(word >> i & 1)) continue;
    const float value = bias.at(first_key + i);
    s[i] = value == -kInf ? -kInf : s[i] + value;
  }
}

// Applies bias and mask to row r of a chunk and returns its largest score.
template <bool kBias>
STOF_INLINE float mask_row(const Problem& p, const Strip& strip, int64_t at, int count, int r, float* s) {
  BiasRow bias;
  if (kBias) bias = bias_row(p, strip.b, strip.h, strip.index * kCell + r);
  Vec top = splat(-kInf);
  for (int j = 0; j < count; ++j, s += kCell) {
    const int32_t slot = strip.slot[at + j];
    const int32_t word = slot < 0 ? 0xffff : uint16_t(p.mask.bits[int64_t(slot) * kCell + r]);
    if (kBias) add_bias(p, bias, int64_t(strip.col[at + j]) * kCell, word, s);
#pragma GCC unroll 4
    for (int i = 0; i < kCell; i += kLanes) {
      Vec x = load(s + i);
      if (slot >= 0) {
        x = kept(word, i) ? x : splat(-kInf);
        store(s + i, x);
      }
      top = vmax(x, top);
    }
  }
  return hmax(top);
}

// One online-softmax step: scores of the chunk become weights; max, sum and alpha move on.
template <bool kBias>
STOF_INLINE void softmax(const Problem& p, const Strip& strip, int64_t at, int count, int rows,
                         Workspace& w) {
  for (int r = 0; r < rows; ++r) {
    const float top = mask_row<kBias>(p, strip, at, count, r, w.s + r * kScoreStride);
    w.base[r] = top > w.max[r] ? top : w.max[r];
  }
  for (int r = 0; r < kCell; r += kLanes) {
    const Vec next = load(w.base + r);
    // A row that has nothing yet keeps -inf as its maximum and subtracts 0, so that its weights are exp(-inf)
    // = 0.
    const Vec base = next == -kInf ? Vec{} : next;
    store(w.alpha + r, exp_nonpositive(load(w.max + r) - base));
    store(w.max + r, next);
    store(w.base + r, base);
  }
  for (int r = 0; r < rows; ++r) {
    float* s = w.s + r * kScoreStride;
    const Vec base = splat(w.base[r]);
    Vec sum = w.sum[r] * w.alpha[r];
    for (int i = 0; i < count * kCell; i += kLanes) {
      const Vec weight = exp_nonpositive(load(s + i) - base);
      store(s + i, weight);
      sum += weight;
    }
    w.sum[r] = sum;
  }
}

// o[r][d..] = o * alpha + P V for kTileRows queries and kVecs vectors of dims.
template <int kVecs>
STOF_INLINE void value_tile(const float* s, const int32_t* col, int count, ValueRows values, int64_t kv_len,
                            const float* alpha, float* o, int64_t o_stride) {
  Vec acc[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) acc[r][i] = load(o + r * o_stride + i * kLanes) * alpha[r];
  }
  for (int j = 0; j < count; ++j, s += kCell) {
    const int64_t first = int64_t(col[j]) * kCell;
    const int keys = int(kv_len - first < kCell ? kv_len - first : kCell);
    const float* v = values.data + first * values.stride;
    for (int key = 0; key < keys; ++key, v += values.stride) {
      Vec value[kVecs];
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) value[i] = load(v + i * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec weight = splat(s[r * kScoreStride + key]);
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) acc[r][i] += weight * value[i];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) store(o + r * o_stride + i * kLanes, acc[r][i]);
  }
}

STOF_INLINE void accumulate(const Problem& p, const int32_t* col, int count, ValueRows values, int rows,
                            Workspace& w) {
  const int64_t padded = p.padded_dim();
  int64_t d = 0;
  for (; d + kTileVecs * kLanes <= padded; d += kTileVecs * kLanes) {
    const ValueRows part = {values.data + d, values.stride};
    for (int r = 0; r < rows; r += kTileRows)
      value_tile<kTileVecs>(w.s + r * kScoreStride, col, count, part, p.kv_len, w.alpha + r,
                            w.o + r * padded + d, padded);
  }
  for (; d < padded; d += kLanes) {
    const ValueRows part = {values.data + d, values.stride};
    for (int r = 0; r < rows; r += kTileRows)
      value_tile<1>(w.s + r * kScoreStride, col, count, part, p.kv_len, w.alpha + r, w.o + r * padded + d,
                    padded);
  }
}

static void block_wise(const Problem& p, const Strip& strip, int chunk_cells, KeyPanels keys,
                       ValueRows values) {
  Workspace w;
  const int64_t left = p.q_len - strip.index * kCell;
  const int rows = int(left < kCell ? left : kCell);
  const int64_t padded = p.padded_dim();
  if (p.q.element == Element::bf16)
    load_queries<uint16_t>(p, strip, rows, w.q);
  else
    load_queries<float>(p, strip, rows, w.q);
  for (int64_t i = 0; i < kCell * padded; ++i) w.o[i] = 0.0f;
  for (int r = 0; r < kCell; ++r) {
    w.max[r] = w.base[r] = -kInf;
    w.sum[r] = Vec{};
  }
  // Tiles cover whole groups of rows; those past the last query compute with zeros and are not written.
  for (int64_t at = 0; at < strip.count; at += chunk_cells) {
    const int count = int(strip.count - at < chunk_cells ? strip.count - at : chunk_cells);
    scores(p, w.q, strip.col + at, count, keys, rows, w.s);
    if (p.bias.data)
      softmax<true>(p, strip, at, count, rows, w);
    else
      softmax<false>(p, strip, at, count, rows, w);
    accumulate(p, strip.col + at, count, values, rows, w);
  }
  for (int r = 0; r < rows; ++r)
    finish_row(p, strip.b, strip.h, strip.index * kCell + r, w.o + r * padded, w.max[r], hsum(w.sum[r]));
}

}  // namespace stof::cpu::STOF_ISA
