// Copies of keys and values in the order in which block_wise reads them.
#pragma once

#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

// Vectors a and b interleaved: lo is a0 b0 a1 b1 ..., hi continues it.
#if __has_builtin(__builtin_shufflevector)
#if defined(__AVX512F__)
STOF_INLINE Vec zip_lo(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
STOF_INLINE Vec zip_hi(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
STOF_INLINE Vec zip_lo(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
STOF_INLINE Vec zip_hi(Vec a, Vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
STOF_INLINE Vec zip_lo(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
STOF_INLINE Vec zip_hi(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif
#else
STOF_INLINE Vec zip_lo(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = i % 2 ? b[i / 2] : a[i / 2];
  return r;
}
STOF_INLINE Vec zip_hi(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = i % 2 ? b[(kLanes + i) / 2] : a[(kLanes + i) / 2];
  return r;
}
#endif

// kLanes rows of kLanes values, transposed: log2(kLanes) perfect shuffles of all the rows.
STOF_INLINE void transpose(Vec (&row)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_lo(row[i], row[i + kLanes / 2]);
      next[2 * i + 1] = zip_hi(row[i], row[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
}

template <typename T>
STOF_INLINE const T* row_base(const Array4& a, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(a.data) + b * a.stride[0] + head * a.stride[1] + row * a.stride[2];
}

template <typename T>
static void pack_panel_of(const Problem& p, int64_t b, int64_t kv_head, int64_t cell, float* panel) {
  const int64_t first = cell * kCell;
  const int rows = int(p.kv_len - first < kCell ? p.kv_len - first : kCell);
  const T* base = row_base<T>(p.k, b, kv_head, first);
  const int64_t stride = p.k.stride[2], step = p.k.stride[3];
  int64_t d = 0;
  if (rows == kCell && step == 1) {
    for (; d + kLanes <= p.dim; d += kLanes) {
      for (int group = 0; group < kCellVecs; ++group) {
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) block[r] = load(base + (group * kLanes + r) * stride + d);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kCell + group * kLanes, block[i]);
      }
    }
  }
  for (; d < p.dim; ++d) {
    for (int r = 0; r < kCell; ++r) panel[d * kCell + r] = r < rows ? widen(base[r * stride + d * step]) : 0.0f;
  }
}

template <typename T>
static void pack_rows_of(const Problem& p, const Array4& from, int64_t b, int64_t kv_head, int64_t cell, float* to) {
  const int64_t first = cell * kCell, padded = p.padded_dim();
  const int rows = int(p.kv_len - first < kCell ? p.kv_len - first : kCell);
  const T* base = row_base<T>(from, b, kv_head, first);
  for (int r = 0; r < kCell; ++r, to += padded, base += from.stride[2]) {
    int64_t d = 0;
    if (r < rows) {
      if (from.stride[3] == 1)
        for (; d + kLanes <= p.dim; d += kLanes) store(to + d, load(base + d));
      for (; d < p.dim; ++d) to[d] = widen(base[d * from.stride[3]]);
    }
    for (; d < padded; ++d) to[d] = 0.0f;
  }
}

static void pack_panel(const Problem& p, int64_t b, int64_t kv_head, int64_t cell, float* panel) {
  if (p.k.element == Element::bf16)
    pack_panel_of<uint16_t>(p, b, kv_head, cell, panel);
  else
    pack_panel_of<float>(p, b, kv_head, cell, panel);
}

static void pack_rows(const Problem& p, const Array4& from, int64_t b, int64_t kv_head, int64_t cell, float* rows) {
  if (from.element == Element::bf16)
    pack_rows_of<uint16_t>(p, from, b, kv_head, cell, rows);
  else
    pack_rows_of<float>(p, from, b, kv_head, cell, rows);
}

}  // namespace stof::cpu::STOF_ISA
