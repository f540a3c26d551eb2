// The kernel of short calls on Hopper itself, and its launch.
#pragma once

#include "hopper_maps.h"
#include "hopper_split.cuh"

namespace stof::cuda {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    hopper_split_kernel(const __grid_constant__ Problem p, const __grid_constant__ BlockLayout layout,
                        const __grid_constant__ HopperMaps maps) {
  extern __shared__ unsigned char raw[];
  let_successor_start();
  const Assignment mine = assignment_of(layout, blockIdx.x);
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
  split.prepare(mine);
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
  const int64_t blocks = static_cast<int64_t>(layout.item_limit) * layout.copies;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(blocks)), C::kThreads, C::kSharedBytes, stream, problem, layout,
                            maps);
}

}  // namespace stof::cuda

// Defines one launcher; the translation units that instances.py generates consist of these.
#define STOF_HOPPER_SPLIT(name, T, dim, groups, stages)                                                \
  namespace stof::cuda {                                                                               \
  cudaError_t name(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {           \
    return launch_hopper_split_as<HopperSplitConfig<T, dim, groups, stages>>(problem, layout, stream); \
  }                                                                                                    \
  }
