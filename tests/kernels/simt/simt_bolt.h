// The names that baselines/csrc/bolt/device.cuh has on a GPU, by simt.h: products with fp32 sums, and more shared memory.
#pragma once
#include <simt.h>

#include <memory>

#undef STOF_DYNAMIC_SHARED
#define STOF_DYNAMIC_SHARED(name) unsigned char* const name = stof::bolt::shared_memory()

inline float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

namespace simt {

// mma.m16n8k{8 * kHalves}.row.col with fp32 sums: in = {c0, .., c3, b.., a..} without rounding inside.
template <int kHalves>
void multiply_single(Warp& warp, const uint32_t (*left)[4]) {
  double a[16][8 * kHalves], b[8 * kHalves][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < kHalves; ++k) {
      for (int e = 0; e < 2; ++e) {
        b[8 * k + 2 * t + e][g] = half_of(warp.in[lane][4 + k], e);
        for (int r = 0; r < 2; ++r) a[g + 8 * r][8 * k + 2 * t + e] = half_of(left[lane][2 * k + r], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float c;
      std::memcpy(&c, &warp.in[lane][i], 4);
      double x = c;
      for (int k = 0; k < 8 * kHalves; ++k) x += a[g + i / 2 * 8][k] * b[k][2 * t + i % 2];
      c = float(x);
      std::memcpy(&warp.out[lane][i], &c, 4);
    }
  }
}

}  // namespace simt

namespace stof::bolt {

using half_t = _Float16;

inline constexpr size_t kSharedLimit = 227 * 1024;  // what a block may have on sm_90

// NaN at the start of every block, whichever of its threads comes first.
inline unsigned char* shared_memory() {
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  static std::unique_ptr<unsigned char, Free> memory{static_cast<unsigned char*>(std::aligned_alloc(128, kSharedLimit))};
  static const void* before = nullptr;
  static dim3 block;
  simt::State& s = simt::state();
  const bool fresh = before != s.fibers.data() || block.x != blockIdx.x || block.y != blockIdx.y || block.z != blockIdx.z;
  if (fresh) {
    before = s.fibers.data(), block = blockIdx;
    uint16_t* halves = reinterpret_cast<uint16_t*>(memory.get());
    for (size_t i = 0; i < kSharedLimit / 2; ++i) halves[i] = 0x7fff;  // two of them are a NaN in fp32 as well
  }
  return memory.get();
}

using bytetransformer::block_barrier;
using bytetransformer::copy_async16;
using bytetransformer::copy_async_commit;
using bytetransformer::copy_async_wait;
using bytetransformer::load_matrices;
using bytetransformer::pack;
using bytetransformer::unpack;
inline float erf_of(float x) { return std::erf(x); }

// A left operand has more registers than a warp hands in at once: it goes beside them.
template <int kHalves>
void multiply_by(float (&c)[4], std::initializer_list<uint32_t> a, std::initializer_list<uint32_t> b) {
  static uint32_t left[64][32][4];
  const int warp = simt::state().now->number / 32;
  std::copy(a.begin(), a.end(), left[warp][simt::lane()]);
  uint32_t in[6] = {};
  std::memcpy(in, c, 16);
  std::copy(b.begin(), b.end(), in + 4);
  const uint32_t* out = simt::collective({in[0], in[1], in[2], in[3], in[4], in[5]}, nullptr,
                                         [warp](simt::Warp& w) { simt::multiply_single<kHalves>(w, left[warp]); });
  std::memcpy(c, out, 16);
}
inline void multiply_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) { multiply_by<1>(c, {a0, a1}, {b}); }
inline void multiply_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_by<2>(c, {a[0], a[1], a[2], a[3]}, {b0, b1});
}

}  // namespace stof::bolt
