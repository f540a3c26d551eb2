// The kernel of short calls on Hopper itself, and its launch.
#pragma once

#include <algorithm>

#include "hopper_maps.h"
#include "hopper_split.cuh"

namespace stof::cuda {

// `shared_items`: the first so many items are of two blocks each, a cluster; the others of one.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerUnit)
    hopper_split_kernel(const __grid_constant__ Problem p, const __grid_constant__ BlockLayout layout,
                        const __grid_constant__ HopperMaps maps, int shared_items) {
  extern __shared__ unsigned char raw[];
  let_successor_start();
  const int block = static_cast<int>(blockIdx.x);
  const bool may_share = C::kShares && block < 2 * shared_items;
  const int place = may_share ? block / 2 : block - shared_items;
  if (C::kShares && place >= layout.item_limit * layout.copies) return;  // clusters are whole
  const Assignment mine = assignment_of(layout, place);
  if (!layout.exact) {
    wait_for_predecessor();
    if (layout.header[6] != 0 || p.counts[3] != 0) {
      fill_with_nan<typename C::T>(p);
      return;
    }
    if (mine.item >= layout.header[0]) return;
  }
  const uint32_t memory = (shared_address(raw) + 1023) & ~1023u;  // what the copy engine swizzles starts at 1024 bytes
  HopperSplit<C> split(p, layout, maps, memory);
  if (!split.prepare(mine, may_share)) return;
  split.start();
  split.work();
  split.finish();
}

template <class C>
cudaError_t launch_hopper_split_as(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};  // devices whose shared-memory limit is raised
  HopperMaps maps;
  if (!make_hopper_maps(problem, &maps)) return cudaErrorNotSupported;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto kernel = hopper_split_kernel<C>;
  error = allow_shared_memory(kernel, C::kSharedBytes, prepared, device);
  if (error != cudaSuccess) return error;
  const int64_t items = static_cast<int64_t>(layout.item_limit) * layout.copies;
  if constexpr (C::kShares) {
    // The longest items, which come first, are shared: as many as leave each block a multiprocessor of its own.
    int units = 0;
    error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t shared = std::clamp<int64_t>(units - items, 0, items), blocks = 2 * shared + (items - shared + 1) / 2 * 2;
    if (shared > 0)
      return launch_overlapping<2>(kernel, dim3{static_cast<unsigned>(blocks)}, C::kThreads, C::kSharedBytes, stream, problem,
                                   layout, maps, static_cast<int>(shared));
  }
  return launch_overlapping(kernel, dim3{static_cast<unsigned>(items)}, C::kThreads, C::kSharedBytes, stream, problem, layout, maps,
                            0);
}

}  // namespace stof::cuda

// Defines one launcher; the translation units that instances.py generates consist of these.
#define STOF_HOPPER_SPLIT(name, T, dim, groups, stages, blocks, shares)                                                \
  namespace stof::cuda {                                                                                               \
  cudaError_t name(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {                           \
    return launch_hopper_split_as<HopperSplitConfig<T, dim, groups, stages, blocks, shares>>(problem, layout, stream); \
  }                                                                                                                    \
  }
