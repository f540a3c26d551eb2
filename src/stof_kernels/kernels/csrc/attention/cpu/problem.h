// What one attention call is, in plain pointers, sizes and strides: the kernels know nothing of torch.
#pragma once

#include <cstdint>

// Members that the kernels call, too, must leave no function of their own behind: see vec.h.
#define STOF_MEMBER __attribute__((always_inline))

namespace stof::cpu {

enum class Element : int { f32, bf16 };

// A (batch, head, row, dim) array; strides count elements and may be any value, 0 included.
struct Array4 {
  const void* data = nullptr;
  Element element = Element::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Side of a mask cell: 16 queries x 16 keys.
constexpr int kCell = 16;

// The canonical lists. A plane is one (batch, head) mask; `batch` and `heads` are 1 where the mask is shared.
struct Mask {
  const int32_t* ptr = nullptr;   // planes * strips + 1
  const int32_t* col = nullptr;   // key cell of each listed cell, ascending inside a strip
  const int32_t* slot = nullptr;  // -1: full cell; else row of bits
  const int16_t* bits = nullptr;  // 16 words per slot; bit c of word r: query r of the strip attends key c
  int64_t batch = 1, heads = 1;
  int64_t strips = 0, cells = 0;  // per plane: strips of queries, cells of keys
  int64_t tail_keys = kCell;      // keys in range in the last cell
  int64_t slots = 0;              // rows of bits
  int64_t listed = 0;             // entries that col and slot hold

  STOF_MEMBER int64_t plane(int64_t b, int64_t h) const {
    return (batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h);
  }
};

struct Problem {
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, kv_len = 0, dim = 0;
  Array4 q, k, v;
  Array4 bias;  // (batch, head, query, key); data is null without a bias
  Mask mask;
  float scale = 1.0f;
  void* out = nullptr;   // (batch, q_len, heads, dim) contiguous, in q's element type
  float* lse = nullptr;  // (batch, heads, q_len) contiguous, or null

  // Row length of every fp32 buffer: dim rounded up so that each instruction set's vectors fit.
  STOF_MEMBER int64_t padded_dim() const { return (dim + kCell - 1) / kCell * kCell; }
};

// Which kernel runs, and how many key cells one online-softmax step of block_wise covers.
enum class Kernel : int { row_wise = 0, block_wise = 1 };
struct Plan {
  Kernel kernel = Kernel::block_wise;
  int chunk_cells = 8;
};

}  // namespace stof::cpu
