// Copies of keys and values in the order in which block_wise reads them.
#pragma once

#include "rows.h"
#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

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

// Sixteen rows to [dim][16], times `scale`, for as many dims as fill whole vectors; returns that number of
// dims.
template <typename T>
STOF_INLINE int64_t transpose_rows(const T* base, int64_t stride, int64_t dim, float* to, float scale) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int group = 0; group < kCell; group += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(base + (group + r) * stride + d) * scale;
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kCell + group, block[i]);
    }
  }
  return d;
}

template <typename T>
static void pack_panel_of(const Problem& p, int64_t b, int64_t kv_head, int64_t cell, float* panel) {
  const int64_t first = cell * kCell;
  const int rows = int(p.kv_len - first < kCell ? p.kv_len - first : kCell);
  const T* base = row_base<T>(p.k, b, kv_head, first);
  const int64_t stride = p.k.stride[2], step = p.k.stride[3];
  const int64_t done = rows == kCell && step == 1 ? transpose_rows(base, stride, p.dim, panel, 1.0f) : 0;
  for (int64_t d = done; d < p.dim; ++d) {
    for (int r = 0; r < kCell; ++r)
      panel[d * kCell + r] = r < rows ? widen(base[r * stride + d * step]) : 0.0f;
  }
}

template <typename T>
static void pack_rows_of(const Problem& p, const Array4& from, int64_t b, int64_t kv_head, int64_t cell,
                         float* to) {
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

static void pack_rows(const Problem& p, const Array4& from, int64_t b, int64_t kv_head, int64_t cell,
                      float* rows) {
  if (from.element == Element::bf16)
    pack_rows_of<uint16_t>(p, from, b, kv_head, cell, rows);
  else
    pack_rows_of<float>(p, from, b, kv_head, cell, rows);
}

}  // namespace stof::cpu::STOF_ISA
