// row_wise: one query row at a time, walking the keys that it keeps; for masks whose cells are almost empty.
//
// Keys and values are read where they lie, nothing is packed. Kept keys are collected in groups of kGroup; a
// group is one online-softmax step.
#pragma once

#include "rows.h"
#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

// Keys to one online-softmax step.
constexpr int kGroup = 128;

// Cells looked at before their words are taken apart.
constexpr int kLook = 256;

// The keys that one row keeps in one cell.
struct Word {
  int32_t first;
  uint32_t bits;
};

struct RowState {
  alignas(64) float q[256];  // scaled, zeros up to the padded dim
  alignas(64) float o[256];
  alignas(64) float s[kGroup + kCell];
  // A whole cell may be added when one place is left, and its numbers are written eight at a time.
  int32_t key[kGroup + 2 * kCell];
  Word word[kLook];
  float max, sum;
};

// For each byte, the numbers of its set bits.
struct BitNumbers {
  alignas(64) int32_t of[256][8];
  constexpr BitNumbers() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) of[byte][n++] = bit;
      }
    }
  }
};
constexpr BitNumbers kBitNumbers;

// Appends the keys of a word: eight numbers are always written and only as many counted as there are bits,
// because a loop over the bits of sparse words is mostly mispredicted branches.
STOF_INLINE int append_keys(int32_t* key, int n, int32_t first, uint32_t word) {
  typedef int32_t Ints __attribute__((vector_size(32)));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, first += 8, word >>= 8) {
    Ints numbers;
    __builtin_memcpy(&numbers, kBitNumbers.of[word & 0xff], 32);
    numbers += first;
    __builtin_memcpy(key + n, &numbers, 32);
    n += __builtin_popcount(word & 0xff);
  }
  return n;
}

// The words of one row that keep anything, of up to kLook cells starting at `from`. `bits` points to the
// row's word of slot 0. Most words of a thin mask are empty, in no predictable order, so this loop has no
// branch on them.
STOF_INLINE int collect_words(const int32_t* col, const int32_t* slot, const int16_t* bits, int64_t from,
                              int64_t count, Word* word) {
  const int64_t end = from + kLook < count ? from + kLook : count;
  int n = 0;
  for (int64_t j = from; j < end; ++j) {
    const uint32_t kept = slot[j] < 0 ? 0xffffu : uint16_t(bits[int64_t(slot[j]) * kCell]);
    word[n] = {col[j] * kCell, kept};
    n += kept != 0;
  }
  return n;
}

// One vector of a row; the last one of a row whose dim is not a multiple of kLanes has 8 values.
template <bool kTail, typename T>
STOF_INLINE Vec load_part(const T* from, int64_t d, int64_t dim) {
  if (!kTail || d + kLanes <= dim) return load(from + d);
  T part[kLanes] = {};
  __builtin_memcpy(part, from + d, 8 * sizeof(T));
  return load(part);
}

// Lane sums of two vectors halved: a and b alternate in the result.
STOF_INLINE Vec merge(Vec a, Vec b) { return zip_lo(a, b) + zip_hi(a, b); }

// Dot products with the keys 0, kQuads, 2 kQuads, 3 kQuads of the list, merged; past the n-th key any key
// will do. Four at a time hide the latency of their sums.
constexpr int kQuads = kLanes / 4;
constexpr int kDotVecs = 8;  // vectors to a partial sum, for the reason that block_wise has its kDotGroup
template <typename T, bool kTail>
STOF_INLINE Vec dot_quad(const RowState& w, const int32_t* key, int n, RawRows keys, int64_t dim) {
  const T* base = static_cast<const T*>(keys.data);
  const T* row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = base + key[i * kQuads < n ? i * kQuads : 0] * keys.stride;
  Vec sum[4] = {};
  int64_t d = 0;
  for (;;) {
    const int64_t last = dim - d > kDotVecs * kLanes ? d + kDotVecs * kLanes : dim;
    Vec part[4] = {};
    for (; d < last; d += kLanes) {
      const Vec q = load(w.q + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] += q * load_part<kTail>(row[i], d, dim);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
    if (d >= dim) break;
  }
  return merge(merge(sum[0], sum[2]), merge(sum[1], sum[3]));
}

// Scores of kLanes keys, of which the first n count; the others are -inf. The sums over lanes are taken like
// a transposition that adds up as it goes: merging i with i + half, half = kLanes / 2 .. 1, ends in natural
// order.
template <typename T, bool kTail>
STOF_INLINE Vec dots(const RowState& w, const int32_t* key, int n, RawRows keys, int64_t dim) {
  Vec quad[kQuads] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kQuads; ++j) {
    if (j < n) quad[j] = dot_quad<T, kTail>(w, key + j, n - j, keys, dim);
  }
#pragma GCC unroll 2
  for (int half = kQuads / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
    for (int j = 0; j < half; ++j) quad[j] = merge(quad[j], quad[j + half]);
  }
  const Vec s = quad[0];
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < splat(int32_t(n)) ? s : splat(-kInf);
}

// o[d .. d + kVecs vectors] = o * alpha + sum of weight * value, two chains per vector.
template <typename T, bool kTail, int kVecs>
STOF_INLINE void add_values(RowState& w, int n, RawRows values, int64_t d, int64_t dim, float alpha) {
  const T* base = static_cast<const T*>(values.data);
  Vec even[kVecs], odd[kVecs] = {};
  for (int i = 0; i < kVecs; ++i) even[i] = load(w.o + d + i * kLanes) * alpha;
  int j = 0;
  for (; j + 2 <= n; j += 2) {
    const T* a = base + w.key[j] * values.stride;
    const T* b = base + w.key[j + 1] * values.stride;
    const Vec wa = splat(w.s[j]), wb = splat(w.s[j + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      even[i] += wa * load_part<kTail>(a, d + i * kLanes, dim);
      odd[i] += wb * load_part<kTail>(b, d + i * kLanes, dim);
    }
  }
  if (j < n) {
    const T* a = base + w.key[j] * values.stride;
    for (int i = 0; i < kVecs; ++i) even[i] += splat(w.s[j]) * load_part<kTail>(a, d + i * kLanes, dim);
  }
  for (int i = 0; i < kVecs; ++i) store(w.o + d + i * kLanes, even[i] + odd[i]);
}

template <typename T, bool kTail>
static void step(const Problem& p, RowState& w, int n, RawRows keys, RawRows values, const BiasRow* bias) {
  Vec top = splat(w.max);
  for (int i = 0; i < n; i += kLanes) {
    Vec s = dots<T, kTail>(w, w.key + i, n - i < kLanes ? n - i : kLanes, keys, p.dim);
    if (bias) {
      float value[kLanes] = {};
      for (int j = 0; j < kLanes && i + j < n; ++j) value[j] = bias->at(w.key[i + j]);
      const Vec b = load(value);
      s = b == -kInf ? b : s + b;
    }
    store(w.s + i, s);
    top = vmax(s, top);
  }
  const float next = hmax(top), base = next == -kInf ? 0.0f : next;
  const float alpha = exp_nonpositive(splat(w.max - base))[0];
  Vec sum = {};
  for (int i = 0; i < n; i += kLanes) {
    const Vec weight = exp_nonpositive(load(w.s + i) - base);
    store(w.s + i, weight);
    sum += weight;
  }
  w.sum = w.sum * alpha + hsum(sum);
  w.max = next;
  const int64_t padded = (p.dim + kLanes - 1) / kLanes * kLanes;
  int64_t d = 0;
  for (; d + 4 * kLanes <= padded; d += 4 * kLanes) add_values<T, kTail, 4>(w, n, values, d, p.dim, alpha);
  for (; d < padded; d += kLanes) add_values<T, kTail, 1>(w, n, values, d, p.dim, alpha);
}

template <typename Q>
static void load_query(const Problem& p, const Strip& strip, int64_t query, RowState& w) {
  const Q* q = row_base<Q>(p.q, strip.b, strip.h, query);
  for (int64_t d = 0; d < p.dim; ++d) w.q[d] = widen(q[d * p.q.stride[3]]) * p.scale;
  for (int64_t d = p.dim; d < p.padded_dim(); ++d) w.q[d] = 0.0f;
  for (int64_t d = 0; d < p.padded_dim(); ++d) w.o[d] = 0.0f;
  w.max = -kInf;
  w.sum = 0.0f;
}

template <typename T, bool kTail>
static void row_wise_of(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  RowState w;
  const int64_t left = p.q_len - strip.index * kCell;
  const int rows = int(left < kCell ? left : kCell);
  const int32_t *col = strip.col, *slot = strip.slot;
  for (int r = 0; r < rows; ++r) {
    const int64_t query = strip.index * kCell + r, count = strip.count;
    const int16_t* bits = p.mask.bits + r;
    load_query<T>(p, strip, query, w);
    BiasRow bias;
    if (p.bias.data) bias = bias_row(p, strip.b, strip.h, query);
    const BiasRow* has_bias = p.bias.data ? &bias : nullptr;
    int n = 0;
    for (int64_t from = 0; from < count; from += kLook) {
      const int words = collect_words(col, slot, bits, from, count, w.word);
      for (int j = 0; j < words; ++j) {
        n = append_keys(w.key, n, w.word[j].first, w.word[j].bits);
        if (n < kGroup) continue;
        step<T, kTail>(p, w, kGroup, keys, values, has_bias);
        n -= kGroup;
        for (int i = 0; i < n; ++i) w.key[i] = w.key[kGroup + i];
      }
    }
    if (n) step<T, kTail>(p, w, n, keys, values, has_bias);
    finish_row(p, strip.b, strip.h, query, w.o, w.max, w.sum);
  }
}

template <typename T>
static void row_wise_any(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  if constexpr (kLanes > 8) {
    if (p.dim % kLanes != 0) return row_wise_of<T, true>(p, strip, keys, values);
  }
  row_wise_of<T, false>(p, strip, keys, values);
}

static void row_wise(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  if (p.q.element == Element::f32)
    row_wise_any<float>(p, strip, keys, values);
  else
    row_wise_any<uint16_t>(p, strip, keys, values);
}

}  // namespace stof::cpu::STOF_ISA
