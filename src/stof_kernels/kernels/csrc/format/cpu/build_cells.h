// Cell lists of a dense mask.
#pragma once

#include <cstdint>
#include <functional>

namespace stof::format {

// A dense (batch, head, query, key) bool array: one byte per element, any strides.
struct Dense {
  const uint8_t* data = nullptr;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

struct Totals {
  int64_t listed = 0, partial = 0, kept = 0;
};

using ForEach = std::function<void(int64_t items, const std::function<void(int64_t)>& body)>;

// First pass: lists of each strip (plane * strips + s) counted; ptr becomes the running sum of listed cells
// and slot_ptr that of partial cells, both with strips + 1 entries per all planes.
Totals count_cells(const Dense& keep, int32_t* ptr, int32_t* slot_ptr, const ForEach& for_each);

// Second pass: writes the lists to the places that the first pass found.
void fill_cells(const Dense& keep, const int32_t* ptr, const int32_t* slot_ptr, int32_t* col, int32_t* slot,
                int16_t* bits, const ForEach& for_each);

}  // namespace stof::format
