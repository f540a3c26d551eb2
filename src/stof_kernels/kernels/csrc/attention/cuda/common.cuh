// Pieces that more than one attention kernel uses.
#pragma once

#include "item_order.cuh"
#include "problem.h"
#include "ptx.cuh"

namespace stof::cuda {

constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLog2e = 1.44269504088896340736f;

// Which (batch, head) a copy of a mask plane is.
struct Instance {
  int batch, head, kv_head;
};

__device__ __forceinline__ Instance instance_of(const Problem& p, int plane, int copy) {
  const int mask_batch = p.planes.quotient(plane), mask_head = plane - mask_batch * p.mask_heads;
  // A mask shared by all heads is copied over the heads, and likewise over the batch.
  const int outer = p.mask_heads == 1 ? p.heads.quotient(copy) : copy;
  const int batch = p.mask_batch == 1 ? outer : mask_batch;
  const int head = p.mask_heads == 1 ? copy - outer * p.q_heads : mask_head;
  return {batch, head, p.shared.quotient(head)};
}

__device__ __forceinline__ int64_t lse_index(const Problem& p, const Instance& at, int row) {
  return (static_cast<int64_t>(at.batch) * p.q_heads + at.head) * p.q_len + row;
}

// What block `block` works on. Copies go in groups whose keys fit in L2; inside a group the longest items of all its copies
// come first.
__device__ __forceinline__ Assignment assignment_of(const BlockLayout& layout, int block) {
  const int group = layout.group_blocks.quotient(block);
  const int index = block - group * static_cast<int>(layout.group_blocks.divisor);
  const int first_copy = group * static_cast<int>(layout.group_copies.divisor);
  const bool last = first_copy + static_cast<int>(layout.group_copies.divisor) >= layout.copies;
  const int item = last ? layout.last_copies.quotient(index) : layout.group_copies.quotient(index);
  const int side = static_cast<int>(last ? layout.last_copies.divisor : layout.group_copies.divisor);
  return {item, first_copy + index - item * side};
}

// Bias of one position in log2 units.
template <typename T>
__device__ __forceinline__ float bias_log2(const BiasView& bias, int64_t offset) {
  const float value = bias.is_float ? __ldg(static_cast<const float*>(bias.data) + offset)
                                    : Element<T>::to_float(static_cast<const T*>(bias.data)[offset]);
  return value * kLog2e;
}

// A mask that did not fit its fixed capacity must not pass for a result.
template <typename T>
__device__ void fill_with_nan(const Problem& p) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.q_heads * p.q_len;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < rows * p.head_dim; i += step) static_cast<T*>(p.out)[i] = Element<T>::quiet_nan();
  if (p.lse == nullptr) return;
  for (int64_t i = first; i < rows; i += step) p.lse[i] = __int_as_float(0x7fffffff);
}

}  // namespace stof::cuda
