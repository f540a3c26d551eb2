// Runs CUDA kernels on the CPU, lane by lane: every thread of a block is a fiber that stops at barriers and warp instructions.
//
// It supplies the names that device.cuh has on a GPU. Tensor-core instructions follow the register layouts of the PTX manual
// and round to fp16 once an instruction; asynchronous copies land when their thread waits for them and not before; shared
// memory starts as NaN where it is dynamic. Fibers run in ascending or in descending order, so a missing barrier shows.
#pragma once
#define STOF_SIMT

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define STOF_DYNAMIC_SHARED(name) unsigned char* const name = simt::state().dynamic_shared.get()

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

using Registers = uint32_t[8];

struct Warp {
  int arrived = 0, generation = 0;
  Registers in[32], out[32];
  const void* address[32];
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int number = 0;
  bool done = false;
  const int* waits_for = nullptr;  // runnable when this has changed from `seen`
  int seen = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct State {
  static constexpr size_t kStack = 64 * 1024, kShared = 64 * 1024;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  int arrived = 0, generation = 0;
  bool descending = false;
  std::function<void()> body;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> dynamic_shared{static_cast<unsigned char*>(std::aligned_alloc(128, kShared))};
};
inline State& state() {
  static State s;
  return s;
}

inline void die(const char* why) {
  std::fprintf(stderr, "simt: %s\n", why);
  std::abort();
}

inline void wait_for_change(const int& counter) {
  Fiber* self = state().now;
  self->waits_for = &counter, self->seen = counter;
  swapcontext(&self->context, &state().scheduler);
}

inline void run_fiber() {
  state().body();
  state().now->done = true;
  swapcontext(&state().now->context, &state().scheduler);
}

inline void run_block(int threads) {
  State& s = state();
  s.arrived = 0;
  for (Warp& warp : s.warps) warp.arrived = 0;
  uint16_t* shared = reinterpret_cast<uint16_t*>(s.dynamic_shared.get());
  for (size_t i = 0; i < State::kShared / 2; ++i) shared[i] = 0x7e00;
  for (Fiber& fiber : s.fibers) {
    fiber.done = false, fiber.waits_for = nullptr;
    fiber.open.clear(), fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = State::kStack;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = s.fibers[s.descending ? threads - 1 - i : i];
      if (fiber.done || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
      fiber.waits_for = nullptr, s.now = &fiber, threadIdx = fiber.thread, moved = true;
      swapcontext(&s.scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (!moved) die("threads wait for each other: a barrier or warp instruction that not all reach");
  }
}

template <typename Body>
void launch(dim3 grid, dim3 block, Body body) {
  State& s = state();
  const int threads = block.x * block.y * block.z;
  s.fibers = std::vector<Fiber>(threads);
  s.warps = std::vector<Warp>((threads + 31) / 32);
  s.body = body, blockDim = block, gridDim = grid;
  for (int i = 0; i < threads; ++i) {
    s.fibers[i].number = i;
    s.fibers[i].thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    s.fibers[i].stack = std::make_unique<char[]>(State::kStack);
  }
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

inline int lane() { return state().now->number % 32; }

// All 32 lanes hand in registers (and an address); the last one runs `finish(warp)`, which fills out[lane].
template <typename Finish>
const uint32_t* collective(std::initializer_list<uint32_t> in, const void* address, const Finish& finish) {
  Warp& warp = state().warps[state().now->number / 32];
  const int self = lane();
  int i = 0;
  for (uint32_t value : in) warp.in[self][i++] = value;
  warp.address[self] = address;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    finish(warp);
    ++warp.generation;
  } else {
    wait_for_change(warp.generation);
  }
  return warp.out[self];
}

inline _Float16 half_of(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline uint32_t pair_of(_Float16 low, _Float16 high) {
  uint16_t bits[2];
  std::memcpy(bits, &low, 2), std::memcpy(bits + 1, &high, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

// mma.m16n8k{8 * kHalves}.row.col with fp16 sums: in = {c0, c1, b.., a..}.
template <int kHalves>
void multiply(Warp& warp) {
  double a[16][8 * kHalves], b[8 * kHalves][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < kHalves; ++k) {
      for (int e = 0; e < 2; ++e) {
        b[8 * k + 2 * t + e][g] = half_of(warp.in[lane][2 + k], e);
        for (int r = 0; r < 2; ++r) a[g + 8 * r][8 * k + 2 * t + e] = half_of(warp.in[lane][2 + kHalves + 2 * k + r], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 2; ++r) {
      _Float16 sum[2];
      for (int e = 0; e < 2; ++e) {
        double x = half_of(warp.in[lane][r], e);
        for (int k = 0; k < 8 * kHalves; ++k) x += a[g + 8 * r][k] * b[k][2 * t + e];
        sum[e] = static_cast<_Float16>(x);
      }
      warp.out[lane][r] = pair_of(sum[0], sum[1]);
    }
  }
}

template <bool kTransposed>
void load_matrices(Warp& warp) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const auto at = [&](int row, int col) { return static_cast<const _Float16*>(warp.address[8 * m + row])[col]; };
      warp.out[lane][m] = kTransposed ? pair_of(at(2 * t, g), at(2 * t + 1, g)) : pair_of(at(g, 2 * t), at(g, 2 * t + 1));
    }
  }
}

}  // namespace simt

namespace stof::bytetransformer {

using half_t = _Float16;

inline float to_float(half_t x) { return static_cast<float>(x); }
inline float to_float(float x) { return x; }
template <typename T>
T from_float(float x) {
  return static_cast<T>(x);
}
inline uint32_t pack(float low, float high) { return simt::pair_of(static_cast<half_t>(low), static_cast<half_t>(high)); }
inline float2 unpack(uint32_t pair) { return {to_float(simt::half_of(pair, 0)), to_float(simt::half_of(pair, 1))}; }
inline uint32_t add_pairs(uint32_t a, uint32_t b) { return pack(unpack(a).x + unpack(b).x, unpack(a).y + unpack(b).y); }
inline uint32_t scale_pair(uint32_t a, float factor, float term) {
  return pack(unpack(a).x * factor + term, unpack(a).y * factor + term);
}
inline float exp_fast(float x) { return std::exp(x); }
inline float divide_fast(float a, float b) { return a / b; }
inline float tanh_of(float x) { return std::tanh(x); }
inline float rsqrt_of(float x) { return 1.f / std::sqrt(x); }

template <typename T, typename Source>
T shuffle(T x, const Source& source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // `source` is a lane's own: it travels with the value.
  const uint32_t* out = simt::collective({bits, static_cast<uint32_t>(source)}, nullptr, [](simt::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = warp.in[warp.in[lane][1]][0];
  });
  std::memcpy(&x, out, 4);
  return x;
}
template <typename T>
T shuffle_xor(T x, int lanes) {
  return shuffle(x, simt::lane() ^ lanes);
}
template <typename T>
T shuffle_up(T x, int lanes) {
  return shuffle(x, simt::lane() >= lanes ? simt::lane() - lanes : simt::lane());
}
template <typename T>
T shuffle_from(T x, int lane) {
  return shuffle(x, lane % 32);
}
inline unsigned ballot(bool vote) {
  return *simt::collective({vote}, nullptr, [](simt::Warp& warp) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (warp.in[lane][0] != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = all;
  });
}
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

inline void block_barrier() {
  simt::State& s = simt::state();
  if (++s.arrived == static_cast<int>(s.fibers.size())) {
    s.arrived = 0;
    ++s.generation;
  } else {
    simt::wait_for_change(s.generation);
  }
}

inline void copy_async16(void* to, const void* from, bool valid) { simt::state().now->open.push_back({to, from, valid}); }
inline void copy_async_commit() {
  simt::Fiber& self = *simt::state().now;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = simt::state().now->groups;
  while (groups.size() > kPending) {
    for (const simt::Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  std::memcpy(r, simt::collective({}, row, simt::load_matrices<false>), 16);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  std::memcpy(r, simt::collective({}, row, simt::load_matrices<true>), 16);
}
inline void multiply_k8(uint32_t (&c)[2], uint32_t a0, uint32_t a1, uint32_t b) {
  std::memcpy(c, simt::collective({c[0], c[1], b, a0, a1}, nullptr, simt::multiply<1>), 8);
}
inline void multiply_k16(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::memcpy(c, simt::collective({c[0], c[1], b0, b1, a[0], a[1], a[2], a[3]}, nullptr, simt::multiply<2>), 8);
}

// WMMA: how a warp spreads a tile over its lanes is its own affair; here lane 0 holds all of it.
class CellSum {
 public:
  template <bool kTransposed>
  void add(const half_t* a, int a_step, const half_t* b, int b_step) {
    for (const void* p : {static_cast<const void*>(a), static_cast<const void*>(b)})
      if (reinterpret_cast<uintptr_t>(p) % 32 != 0 || a_step % 8 != 0 || b_step % 8 != 0) simt::die("WMMA tile not aligned");
    if (simt::lane() != 0) return;
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        double x = sum_[i][j];
        for (int k = 0; k < 16; ++k)
          x += static_cast<double>(a[i * a_step + k]) * static_cast<double>(kTransposed ? b[j * b_step + k] : b[k * b_step + j]);
        sum_[i][j] = static_cast<half_t>(x);
      }
    }
  }
  void store(half_t* to, int step) const {
    if (reinterpret_cast<uintptr_t>(to) % 32 != 0) simt::die("WMMA tile not aligned");
    if (simt::lane() != 0) return;
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) to[i * step + j] = sum_[i][j];
  }

 private:
  half_t sum_[16][16] = {};
};

}  // namespace stof::bytetransformer
