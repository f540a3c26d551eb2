// What Hopper's kernels for short calls need of the machine beside hopper_ptx.cuh: pairs and fours in shared memory, a barrier of
// one warpgroup, and the other block of a cluster of two.
#pragma once

#include "hopper_ptx.cuh"

namespace stof::cuda {

__device__ __forceinline__ void store_shared(uint32_t address, const int2& x) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const float2& x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ float2 load_floats2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_floats4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// The warpgroup's number in its block, read anew at each call: a loop may have no register to keep it in. Of whole warps.
__device__ __forceinline__ int own_warpgroup() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return __shfl_sync(0xffffffffu, thread >> 7, 0);
}

// Of all threads of that warpgroup.
__device__ __forceinline__ void warpgroup_barrier(int group) {
  asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory");
}

// ---- clusters of two blocks ------------------------------------------------------------------------------------------------

// The block's number in its cluster; 0 where there is none.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of all threads of both blocks, in two steps.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// The same place in the shared memory of the other block.
__device__ __forceinline__ uint32_t in_other_block(uint32_t address) {
  uint32_t x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(x) : "r"(address), "r"(cluster_rank() ^ 1));
  return x;
}

// Stores there, whose bytes count at a barrier there.
__device__ __forceinline__ void send(uint32_t address, const float2& x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(address), "f"(x.x),
               "f"(x.y), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send(uint32_t address, const float4& x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(address),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
}

// As barrier_wait(), for what the other block sends.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

}  // namespace stof::cuda
