// What the kernels are told. Tensors are contiguous; "halves" are fp16.
#pragma once

#include <cstdint>

#include "shapes.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
namespace stof::bytetransformer {
using half_t = __half;
}
#elif !defined(STOF_SIMT)
struct __half;  // host code passes pointers on and no more
namespace stof::bytetransformer {
using half_t = __half;
}
#endif

namespace stof::bytetransformer {

// qkv (batch, seq_len, 3 * heads * head_dim) without bias, bias (3 * heads * head_dim), mask (batch, seq_len, seq_len) of ones and
// zeros, out (batch, seq_len, heads * head_dim): all halves.
struct ShortProblem {
  const half_t* qkv;
  const half_t* bias;
  const half_t* mask;
  half_t* out;
  int batch, seq_len, heads, head_dim;
  float scale;
};

// split (3, heads, batch, seq_len, 64): queries, keys and values with their bias. scores (batch, heads, seq_len, seq_len) halves.
// partials (batch, heads, ceil(seq_len / 128), seq_len): maximum and sum of a row within a column tile; stats (batch, heads,
// seq_len): of the whole row. lengths (batch): tokens of each sequence, at most seq_len; the rest is neither read nor written.
struct LongProblem {
  const half_t* split;
  const half_t* mask;
  const int* lengths;
  half_t* scores;
  float* partials;
  float* stats;
  half_t* out;
  int batch, seq_len, heads;
  float scale;
};

}  // namespace stof::bytetransformer
