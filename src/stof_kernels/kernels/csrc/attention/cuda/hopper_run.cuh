// The Hopper kernel itself, and its launch: roles, barriers, tensor maps.
#pragma once

#include <atomic>

#include "hopper_consumer.cuh"
#include "hopper_maps.h"
#include "hopper_producer.cuh"
#include "launch.h"

namespace stof::cuda {

// By the thread that brings the set's items.
template <class C>
__device__ __forceinline__ void init_control(const HopperControl<C::kSlots>& control, const HopperMaps& maps) {
  prefetch_map(&maps.q), prefetch_map(&maps.k_run), prefetch_map(&maps.k_tile);
  prefetch_map(&maps.v_run), prefetch_map(&maps.v_tile);
  barrier_init(control.query_full(), 1);
  barrier_init(control.query_empty(), C::kShare * 4);
  for (int s = 0; s < C::kSlots; ++s) {
    barrier_init(control.full(s), 1);
    barrier_init(control.empty(s), C::kShare * 4);
  }
  barrier_init_fence();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    hopper_kernel(const __grid_constant__ Problem p, const __grid_constant__ BlockLayout layout,
                  const __grid_constant__ HopperMaps maps) {
  extern __shared__ unsigned char raw[];
  using Control = HopperControl<C::kSlots>;
  static_assert(Control::kBytes * C::kSets <= C::kControlBytes, "control block");
  let_successor_start();
  if (!layout.exact) {
    wait_for_predecessor();
    if (layout.header[6] != 0 || p.counts[3] != 0) {
      fill_with_nan<typename C::T>(p);
      return;
    }
  }
  const uint32_t first = (shared_address(raw) + 1023) & ~1023u;  // what the copy engine swizzles starts at 1024 bytes
  const uint32_t controls = first + C::kSets * C::kSetBytes;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x >> 7, 0);
  if (warpgroup == C::kWarpgroups) {
    give_registers<C::kProducerRegisters>();
    const int set = (threadIdx.x >> 5) & 3;
    const bool works = set < C::kSets && (threadIdx.x & 31) == 0;
    const Control control{controls + set * Control::kBytes};
    if (works) init_control<C>(control, maps);
    __syncwarp();
    all_arrive<C::kThreads>();  // does not wait: the first copies start before the others are here
    wait_for_predecessor();
    if (works) {
      HopperProducer<C> producer(p, layout, maps, first + set * C::kSetBytes, control);
      producer.run(set);
    }
  } else {
    take_registers<C::kRegisters>();
    all_wait<C::kThreads>();
    wait_for_predecessor();
    const int set = warpgroup / C::kShare;
    const Control control{controls + set * Control::kBytes};
    HopperConsumer<C> consumer(p, layout, first + set * C::kSetBytes, control, warpgroup % C::kShare);
    consumer.run();
  }
}

// Copies in smaller groups than blocks that come and go need.
inline BlockLayout regrouped(const Problem& problem, BlockLayout layout, int sets) {
  const int64_t copy_bytes = int64_t{4} * problem.kv_len * problem.head_dim;
  const int64_t group = copies_of_group(copy_bytes, layout.item_limit, layout.copies, sets);
  layout.group_copies = FastDivisor(static_cast<uint32_t>(group));
  return layout;
}

// Number of items dealt beyond the first, counted on the device: set to zero before the launch.
inline cudaError_t reset_counter(const BlockLayout& layout, cudaStream_t stream) {
  return layout.next_unit == nullptr ? cudaSuccess : cudaMemsetAsync(layout.next_unit, 0, sizeof(int), stream);
}

template <class C>
cudaError_t launch_hopper_as(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};  // devices whose shared-memory limit is raised
  HopperMaps maps;
  if (!make_hopper_maps(problem, &maps)) return cudaErrorNotSupported;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto kernel = hopper_kernel<C>;
  error = allow_shared_memory(kernel, C::kSharedBytes, prepared, device);
  if (error != cudaSuccess) return error;
  const int64_t units = static_cast<int64_t>(layout.item_limit) * layout.copies;
  const int blocks = static_cast<int>(units < multiprocessors ? units : multiprocessors);
  error = reset_counter(layout, stream);
  if (error != cudaSuccess) return error;
  return launch_overlapping(kernel, dim3(blocks), C::kThreads, C::kSharedBytes, stream, problem,
                            regrouped(problem, layout, C::kSets * blocks), maps);
}

}  // namespace stof::cuda

// Defines one launcher; the translation units that instances.py generates consist of these.
#define STOF_HOPPER(name, T, dim, sets, share, slots, registers, paired)                                           \
  namespace stof::cuda {                                                                                           \
  cudaError_t name(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {                       \
    return launch_hopper_as<HopperConfig<T, dim, sets, share, slots, registers, paired>>(problem, layout, stream); \
  }                                                                                                                \
  }
