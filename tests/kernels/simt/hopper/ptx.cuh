// What csrc's header of this name has, on the CPU, as far as the Hopper kernel uses it.
//
// A load of matrices is on its way until a product takes them: what is put in their place before shows.
#pragma once

#include <array>
#include <cuda_runtime_api.h>
#include <map>

#define __grid_constant__
using __half = _Float16;

inline int __umulhi(uint32_t a, uint32_t b) { return int(uint64_t{a} * b >> 32); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, simt::lane() ^ lanes);
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace simt {

using Rows = std::array<const void*, 32>;  // of a warp's matrices

inline std::array<std::array<uint32_t, 4>, 32> read_matrices(const Rows& rows) {
  Warp warp;
  for (int l = 0; l < 32; ++l) warp.address[l] = rows[l];
  load_matrices<false>(warp);
  std::array<std::array<uint32_t, 4>, 32> found;
  for (int l = 0; l < 32; ++l) std::copy(warp.out[l], warp.out[l] + 4, found[l].begin());
  return found;
}

struct Load {
  const void* row;
  uint32_t* to;
  std::shared_ptr<const Rows> rows;
  std::array<uint32_t, 4> seen;
};
inline std::vector<Load>& loads_here() {
  static std::map<int, std::vector<Load>> all;  // by thread
  return all[state().now->number];
}

inline void start_load(uint32_t* to, const void* row) {
  Load mine{row, to, nullptr, {}};
  collective({}, &mine, [](Warp& warp) {
    Rows rows;
    const auto of = [&](int l) -> Load& { return *static_cast<Load*>(const_cast<void*>(warp.address[l])); };
    for (int l = 0; l < 32; ++l) rows[l] = of(l).row;
    const auto found = read_matrices(rows);
    const auto shared = std::make_shared<const Rows>(rows);
    for (int l = 0; l < 32; ++l) of(l).rows = shared, of(l).seen = found[l];
  });
  std::copy(mine.seen.begin(), mine.seen.end(), to);
  loads_here().push_back(mine);
}

// Of this thread; what it did to the registers meanwhile is a change of bits.
inline void end_loads() {
  for (const Load& load : loads_here()) {
    const auto found = read_matrices(*load.rows)[lane()];
    for (int i = 0; i < 4; ++i) load.to[i] ^= load.seen[i] ^ found[i];
  }
  loads_here().clear();
}

}  // namespace simt

namespace stof::cuda {

constexpr uint32_t kSharedMemory = 227 * 1024;
alignas(1024) inline unsigned char shared_memory[kSharedMemory];
inline uint32_t shared_address(const void*) { return 0; }

inline void load_matrices(uint32_t (&r)[4], uint32_t address) { simt::start_load(r, shared_memory + address); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.f / x; }
inline float log2_fast(float x) { return std::log2(x); }

template <typename T>
struct Element;
template <>
struct Element<__half> {
  static constexpr bool kIsHalf = true;
  static uint32_t pack(float low, float high) { return simt::pair_of(_Float16(low), _Float16(high)); }
  static float to_float(__half x) { return float(x); }
  static __half quiet_nan() { return _Float16(NAN); }
  // c += a (16 x 16) * b (16 x 8)
  static void multiply(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    simt::end_loads();
    struct Operands {
      float* c;
      uint32_t a[4], b[2];
    } mine{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    simt::collective({}, &mine, [](simt::Warp& warp) {
      const auto of = [&](int lane) -> const Operands& { return *static_cast<const Operands*>(warp.address[lane]); };
      for (int row = 0; row < 16; ++row) {
        for (int n = 0; n < 8; ++n) {
          float& sum = of(row % 8 * 4 + n / 2).c[row / 8 * 2 + (n & 1)];
          double x = sum;
          for (int k = 0; k < 16; ++k)
            x += double(simt::half_of(of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k & 1)) *
                 double(simt::half_of(of(n * 4 + k % 8 / 2).b[k / 8], k & 1));
          sum = float(x);
        }
      }
    });
  }
};

}  // namespace stof::cuda
