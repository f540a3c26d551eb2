// Two passes over the dense mask, one strip of 16 queries per work item: count, then write. The place of
// every entry follows from the counts alone, so the lists do not depend on the threads.
#include "build_cells.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace stof::format {
namespace {

constexpr int kCell = 16;

struct Sizes {
  int64_t strips, cells, items;
  explicit Sizes(const Dense& d)
      : strips((d.size[2] + kCell - 1) / kCell),
        cells((d.size[3] + kCell - 1) / kCell),
        items(d.size[0] * d.size[1] * strips) {}
};

// Bytes 0 / not 0 of eight keys to eight bits: normalise each byte to its lowest bit, then gather them by a
// product.
uint32_t eight_bits(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  x = (((x & 0x7f7f7f7f7f7f7f7fULL) + 0x7f7f7f7f7f7f7f7fULL) | x) >> 7 & 0x0101010101010101ULL;
  return uint32_t(x * 0x0102040810204080ULL >> 56);
}

// One row of one cell; keys past the end are 0.
uint16_t word_of(const uint8_t* row, int64_t step, int64_t first, int64_t keys) {
  if (step == 1 && keys == kCell) return uint16_t(eight_bits(row + first) | eight_bits(row + first + 8) << 8);
  uint32_t word = 0;
  for (int64_t i = 0; i < keys; ++i) word |= uint32_t(row[(first + i) * step] != 0) << i;
  return uint16_t(word);
}

struct Cell {
  uint16_t word[kCell];
  bool full;
  int kept;
};

// Calls visit(key cell, Cell) for every non-empty cell of a strip, in ascending order.
template <typename Visit>
void visit_strip(const Dense& d, const Sizes& sizes, int64_t item, const Visit& visit) {
  const int64_t plane = item / sizes.strips, first_row = item % sizes.strips * kCell;
  const int64_t b = plane / d.size[1], h = plane % d.size[1];
  const uint8_t* base = d.data + b * d.stride[0] + h * d.stride[1] + first_row * d.stride[2];
  const int rows = int(std::min<int64_t>(d.size[2] - first_row, kCell));
  for (int64_t c = 0; c < sizes.cells; ++c) {
    const int64_t keys = std::min<int64_t>(d.size[3] - c * kCell, kCell);
    Cell cell = {};
    uint16_t any = 0, all = 0xffff;
    for (int r = 0; r < rows; ++r) {
      const uint16_t word = word_of(base + r * d.stride[2], d.stride[3], c * kCell, keys);
      cell.word[r] = word;
      any |= word;
      all &= word;
      cell.kept += __builtin_popcount(word);
    }
    if (any == 0) continue;
    cell.full = all == 0xffff;  // a cell that kv_len cuts can never be: its last keys are 0
    visit(c, cell);
  }
}

}  // namespace

Totals count_cells(const Dense& keep, int32_t* ptr, int32_t* slot_ptr, const ForEach& for_each) {
  const Sizes sizes(keep);
  std::atomic<int64_t> kept{0};
  for_each(sizes.items, [&](int64_t item) {
    int32_t listed = 0, partial = 0;
    int64_t here = 0;
    visit_strip(keep, sizes, item, [&](int64_t, const Cell& cell) {
      ++listed;
      partial += !cell.full;
      here += cell.kept;
    });
    ptr[item + 1] = listed;
    slot_ptr[item + 1] = partial;
    kept.fetch_add(here, std::memory_order_relaxed);
  });
  Totals totals;
  ptr[0] = slot_ptr[0] = 0;
  for (int64_t i = 1; i <= sizes.items; ++i) {
    totals.listed += ptr[i];
    totals.partial += slot_ptr[i];
    ptr[i] = int32_t(totals.listed);
    slot_ptr[i] = int32_t(totals.partial);
  }
  totals.kept = kept.load();
  return totals;
}

void fill_cells(const Dense& keep, const int32_t* ptr, const int32_t* slot_ptr, int32_t* col, int32_t* slot,
                int16_t* bits, const ForEach& for_each) {
  const Sizes sizes(keep);
  for_each(sizes.items, [&](int64_t item) {
    int64_t at = ptr[item];
    int32_t next_slot = slot_ptr[item];
    visit_strip(keep, sizes, item, [&](int64_t c, const Cell& cell) {
      col[at] = int32_t(c);
      slot[at] = cell.full ? -1 : next_slot;
      if (!cell.full) std::memcpy(bits + int64_t(next_slot++) * kCell, cell.word, sizeof cell.word);
      ++at;
    });
  });
}

}  // namespace stof::format
