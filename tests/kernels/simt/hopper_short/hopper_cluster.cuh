// What csrc's header of this name has, on the CPU. The threads of both blocks of a cluster are fibers of one launch, the block is
// threadIdx.y, and its shared memory starts at a megabyte times that.
#pragma once

#include "hopper_ptx.cuh"

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

namespace simt {

// Barriers of some threads of a block, by block and name, and of both blocks.
struct Barriers {
  std::map<int, int> arrived, complete;
  int in_cluster = 0, events = 0;
};
inline Barriers& barriers() {
  static Barriers all;
  return all;
}

inline void wait_for_all(int name, int threads) {
  const int key = int(threadIdx.y) << 8 | name;
  const int before = barriers().complete[key];
  if (++barriers().arrived[key] == threads) barriers().arrived[key] = 0, ++barriers().complete[key];
  while (barriers().complete[key] == before) wait_for_change(barriers().complete[key]);
}

}  // namespace simt

#define __syncthreads() simt::wait_for_all(0, blockDim.x)

namespace stof::cuda {

template <typename T>
void store_shared(uint32_t address, const T& x) {
  if (address % sizeof(T) != 0) simt::die("a store at an odd address");
  std::memcpy(shared_memory + address, &x, sizeof x);
}
inline float2 load_floats2(uint32_t address) { return load_as<float2>(address); }
inline float4 load_floats4(uint32_t address) { return load_as<float4>(address); }

inline int own_warpgroup() { return int(threadIdx.x >> 7); }
inline void warpgroup_barrier(int group) { simt::wait_for_all(group + 1, 128); }

inline int cluster_rank() { return int(threadIdx.y); }
inline void cluster_arrive() { ++simt::barriers().in_cluster, ++simt::barriers().events; }
inline void cluster_wait() {
  while (simt::barriers().in_cluster < int(2 * blockDim.x)) simt::wait_for_change(simt::barriers().events);
}
inline uint32_t in_other_block(uint32_t address) {
  if (blockDim.y != 2) simt::die("no other block");
  return address ^ 1 << 20;
}
template <typename T>
void send(uint32_t address, const T& x, uint32_t barrier) {
  if (simt::barriers().in_cluster < int(2 * blockDim.x)) simt::die("sent before the other block is ready");
  if (address >> 20 == threadIdx.y || barrier >> 20 == threadIdx.y) simt::die("sent to the own block");
  land(barrier, sizeof x, [=] { store_shared(address, x); });
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

}  // namespace stof::cuda
