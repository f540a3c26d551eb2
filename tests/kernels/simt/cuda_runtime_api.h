// The names of CUDA that the format's kernels use, by simt.h: the very .cu sources compile against this as plain C++ once their
// launches are spelled simt::launch (test_format_emulated.py does that).
#pragma once
#include <simt.h>

#include <algorithm>

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  if (size_t(bytes) > simt::State::kShared) simt::die("more shared memory than the emulator has");
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned __vcmpne4(unsigned a, unsigned b) {
  unsigned out = 0;
  for (int i = 0; i < 32; i += 8) out |= ((a >> i & 255) != (b >> i & 255) ? 255u : 0u) << i;
  return out;
}
// Fibers change places at barriers only.
template <typename T>
T atomicAdd(T* to, T x) {
  const T old = *to;
  *to += x;
  return old;
}
template <typename T>
T atomicOr(T* to, T x) {
  const T old = *to;
  *to |= x;
  return old;
}
template <typename T>
T atomicMax(T* to, T x) {
  const T old = *to;
  *to = std::max(*to, x);
  return old;
}

inline void __syncthreads() { stof::bytetransformer::block_barrier(); }

namespace simt {
// A value from another lane; a lane names its source.
template <typename T>
T exchange(T x, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t words[2] = {};
  std::memcpy(words, &x, sizeof x);
  const uint32_t* out = collective({words[0], words[1], uint32_t(source)}, nullptr, [](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) warp.out[lane][i] = warp.in[warp.in[lane][2]][i];
  });
  std::memcpy(&x, out, sizeof x);
  return x;
}
inline void need_all(unsigned mask) {
  if (mask != 0xffffffffu) die("a warp instruction of some lanes only");
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  simt::need_all(mask);
  return simt::exchange(x, lane & 31);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int lanes) {
  simt::need_all(mask);
  return simt::exchange(x, simt::lane() >= lanes ? simt::lane() - lanes : simt::lane());
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, int lanes) {
  simt::need_all(mask);
  return simt::exchange(x, simt::lane() + lanes < 32 ? simt::lane() + lanes : simt::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  simt::need_all(mask);
  return stof::bytetransformer::ballot(vote);
}
inline int __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
inline void __syncwarp() { stof::bytetransformer::ballot(true); }
inline unsigned __match_any_sync(unsigned mask, int x) {
  simt::need_all(mask);
  return *simt::collective({uint32_t(x)}, nullptr, [](simt::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      warp.out[lane][0] = 0;
      for (int other = 0; other < 32; ++other) warp.out[lane][0] |= (warp.in[other][0] == warp.in[lane][0] ? 1u : 0u) << other;
    }
  });
}
inline int __reduce_add_sync(unsigned mask, int x) {
  simt::need_all(mask);
  return int(*simt::collective({uint32_t(x)}, nullptr, [](simt::Warp& warp) {
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += warp.in[lane][0];
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = sum;
  }));
}
inline int __reduce_max_sync(unsigned mask, int x) {
  simt::need_all(mask);
  return int(*simt::collective({uint32_t(x)}, nullptr, [](simt::Warp& warp) {
    uint32_t most = warp.in[0][0];
    for (int lane = 1; lane < 32; ++lane) most = uint32_t(std::max(int(most), int(warp.in[lane][0])));
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = most;
  }));
}
