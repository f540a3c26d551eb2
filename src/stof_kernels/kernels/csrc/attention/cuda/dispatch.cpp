// Which instantiation of the block-wise kernel serves a call: of its shape, the smallest head dim that fits.
#include "problem.h"

namespace stof::cuda {
namespace {

const BlockWiseEntry* find_entry(Shape shape, int head_dim, bool is_bf16, bool has_bias) {
  const BlockWiseEntry* best = nullptr;
  for (int i = 0; i < kBlockWiseEntries; ++i) {
    const BlockWiseEntry& entry = kBlockWiseTable[i];
    if (entry.shape != shape || entry.is_bf16 != is_bf16 || entry.has_bias != has_bias || entry.dim < head_dim) continue;
    if (best == nullptr || entry.dim < best->dim) best = &entry;
  }
  return best;
}

}  // namespace

bool has_shape(Shape shape, int head_dim, bool has_bias) {
  return find_entry(shape, head_dim, false, has_bias) != nullptr;
}

cudaError_t launch_block_wise(const Problem& problem, const BlockLayout& layout, Shape shape, cudaStream_t stream) {
  const BlockWiseEntry* entry = find_entry(shape, problem.head_dim, problem.is_bf16, problem.bias.data != nullptr);
  if (entry == nullptr) return cudaErrorInvalidDeviceFunction;
  if (layout.item_limit == 0) return cudaSuccess;
  const cudaError_t error = entry->launch(problem, layout, stream);
  if (error != cudaErrorNotSupported) return error;
  // Tensor maps cannot describe these tensors: the kernel that copies by itself can read them.
  entry = find_entry(query_tile(shape) == 128 ? Shape::kLarge : Shape::kWide, problem.head_dim, problem.is_bf16, false);
  return entry == nullptr ? cudaErrorInvalidDeviceFunction : entry->launch(problem, layout, stream);
}

}  // namespace stof::cuda
