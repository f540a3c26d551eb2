// row_wise: one query row at a time, walking the keys that it keeps; for masks whose cells are almost empty.
//
// Keys and values are read where they lie, nothing is packed. Kept keys are collected in groups of kGroup; a group is
// one online-softmax step.
#pragma once

#include "finish.h"
#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

constexpr int kGroup = 64;

struct RowState {
  alignas(64) float q[256];  // scaled, zeros up to the padded dim
  alignas(64) float o[256];
  alignas(64) float s[kGroup + kCell];
  int32_t key[kGroup + kCell];  // a whole cell may be added when one place is left
  int n = 0;
  float max = -kInf, sum = 0.0f;
};

// One vector of a row; the last one of a row whose dim is not a multiple of kLanes has 8 values.
template <bool kTail, typename T>
STOF_INLINE Vec load_part(const T* from, int64_t d, int64_t dim) {
  if (!kTail || d + kLanes <= dim) return load(from + d);
  T part[kLanes] = {};
  __builtin_memcpy(part, from + d, 8 * sizeof(T));
  return load(part);
}

// Four dot products at once hide the latency of their sums.
template <typename T, bool kTail>
STOF_INLINE void dots(const RowState& w, const int32_t* key, RawRows keys, int64_t dim, float* s) {
  const T* base = static_cast<const T*>(keys.data);
  const T* row[4];
  for (int i = 0; i < 4; ++i) row[i] = base + key[i] * keys.stride;
  Vec acc[4] = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec q = load(w.q + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[i] += q * load_part<kTail>(row[i], d, dim);
  }
  for (int i = 0; i < 4; ++i) s[i] = hsum(acc[i]);
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
  const int32_t last = w.key[n - 1];
  int32_t tail[4] = {last, last, last, last};
  int j = 0;
  for (; j + 4 <= n; j += 4) dots<T, kTail>(w, w.key + j, keys, p.dim, w.s + j);
  if (j < n) {
    for (int i = 0; j + i < n; ++i) tail[i] = w.key[j + i];
    dots<T, kTail>(w, tail, keys, p.dim, w.s + j);
  }
  if (bias) {
    for (int i = 0; i < n; ++i) {
      const float value = bias->at(w.key[i]);
      w.s[i] = value == -kInf ? -kInf : w.s[i] + value;
    }
  }
  for (int i = n; i % kLanes; ++i) w.s[i] = -kInf;
  Vec top = splat(w.max);
  for (int i = 0; i < n; i += kLanes) top = vmax(load(w.s + i), top);
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

template <typename Q, typename T, bool kTail>
static void row_wise_of(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  RowState w;
  const int64_t left = p.q_len - strip.index * kCell;
  const int rows = int(left < kCell ? left : kCell);
  for (int r = 0; r < rows; ++r) {
    const int64_t query = strip.index * kCell + r;
    const Q* q = static_cast<const Q*>(p.q.data) + strip.b * p.q.stride[0] + strip.h * p.q.stride[1] +
                 query * p.q.stride[2];
    for (int64_t d = 0; d < p.dim; ++d) w.q[d] = widen(q[d * p.q.stride[3]]) * p.scale;
    for (int64_t d = p.dim; d < p.padded_dim(); ++d) w.q[d] = 0.0f;
    for (int64_t d = 0; d < p.padded_dim(); ++d) w.o[d] = 0.0f;
    w.n = 0;
    w.max = -kInf;
    w.sum = 0.0f;
    BiasRow bias;
    if (p.bias.data) bias = bias_row(p, strip.b, strip.h, query);
    const BiasRow* has_bias = p.bias.data ? &bias : nullptr;
    for (int64_t j = 0; j < strip.count; ++j) {
      const int32_t slot = strip.slot[j], first = strip.col[j] * kCell;
      uint32_t word = slot < 0 ? 0xffffu : uint16_t(p.mask.bits[int64_t(slot) * kCell + r]);
      for (; word; word &= word - 1) w.key[w.n++] = first + __builtin_ctz(word);
      if (w.n >= kGroup) {
        step<T, kTail>(p, w, kGroup, keys, values, has_bias);
        w.n -= kGroup;
        for (int i = 0; i < w.n; ++i) w.key[i] = w.key[kGroup + i];
      }
    }
    if (w.n) step<T, kTail>(p, w, w.n, keys, values, has_bias);
    finish_row(p, strip.b, strip.h, query, w.o, w.max, w.sum);
  }
}

template <typename Q, typename T>
static void row_wise_any(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  if (kLanes > 8 && p.dim % kLanes != 0)
    row_wise_of<Q, T, true>(p, strip, keys, values);
  else
    row_wise_of<Q, T, false>(p, strip, keys, values);
}

static void row_wise(const Problem& p, const Strip& strip, RawRows keys, RawRows values) {
  if (p.q.element == Element::f32)
    row_wise_any<float, float>(p, strip, keys, values);
  else
    row_wise_any<uint16_t, uint16_t>(p, strip, keys, values);
}

}  // namespace stof::cpu::STOF_ISA
