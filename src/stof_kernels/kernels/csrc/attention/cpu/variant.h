// The kernels of one instruction set, as a table of functions. variant.cpp is compiled once per set, each
// time in a namespace of its own, and the driver picks a table when the library is first used.
#pragma once

#include "problem.h"

namespace stof::cpu {

// Largest online-softmax step of block_wise, in key cells.
constexpr int kMaxChunkCells = 16;

// Keys or values of one (batch, kv head) as the kernels read them.
struct KeyPanels {
  const float* data = nullptr;  // [key cell][dim][16 keys]
};
struct ValueRows {
  const float* data = nullptr;  // row of key j at data + j * stride; padded_dim values each
  int64_t stride = 0;
};

// One strip of 16 queries of one (batch, head).
struct Strip {
  int64_t b = 0, h = 0, index = 0;
  const int32_t* col = nullptr;
  const int32_t* slot = nullptr;
  int64_t count = 0;  // listed cells
};

// Rows of an array as they lie in memory, for row_wise: unit stride along dim.
struct RawRows {
  const void* data = nullptr;
  Element element = Element::f32;
  int64_t stride = 0;
};

struct Variant {
  const char* name;
  // Keys of cell `cell` to its panel; rows past kv_len become zeros.
  void (*pack_panel)(const Problem& p, int64_t b, int64_t kv_head, int64_t cell, float* panel);
  // Rows of k or v that belong to key cell `cell` to fp32 rows of padded_dim values, zeros outside.
  void (*pack_rows)(const Problem& p, const Array4& from, int64_t b, int64_t kv_head, int64_t cell,
                    float* rows);
  void (*block_wise)(const Problem& p, const Strip& strip, int chunk_cells, KeyPanels keys, ValueRows values);
  void (*row_wise)(const Problem& p, const Strip& strip, RawRows keys, RawRows values);
};

namespace baseline {
const Variant& variant();
}
namespace avx2 {
const Variant& variant();
}
namespace avx512 {
const Variant& variant();
}

}  // namespace stof::cpu
