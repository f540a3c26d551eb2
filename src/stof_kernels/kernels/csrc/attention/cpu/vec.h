// Vectors of the widest registers that this translation unit may use, through the compiler's vector
// extensions.
//
// Everything lives in the namespace STOF_ISA and nothing comes from the C++ library: an inline function that
// three translation units share would be kept once by the linker, perhaps with instructions the machine does
// not have.
#pragma once

#include <stdint.h>

#include "problem.h"

#define STOF_INLINE inline __attribute__((always_inline))

namespace stof::cpu::STOF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kCellVecs = kCell / kLanes;  // vectors that hold one row of a cell

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = __builtin_inff();

STOF_INLINE Vec splat(float x) { return x - Vec{}; }
STOF_INLINE IVec splat(int32_t x) { return x - IVec{}; }

STOF_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
STOF_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// bf16 is the upper half of an fp32 number.
STOF_INLINE float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
STOF_INLINE float widen(float x) { return x; }
STOF_INLINE Vec load(const uint16_t* p) {
  HVec h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}

// Round to nearest even; a NaN stays a quiet NaN.
STOF_INLINE uint16_t narrow(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if (f != f) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

STOF_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// Over the lanes: halves of the vector against each other, until one lane is left.
STOF_INLINE float hmax(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}
STOF_INLINE float hsum(Vec v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// exp(x) for x <= 0 (NaN stays NaN): x = n ln2 + r, e^r = 1 + r + r^2 P(r). P was fitted on Chebyshev nodes
// over |r| <= 0.35 (relative error 1.1e-8); results below 2^-125 become 0. Adding 1.5 * 2^23 rounds to an
// integer and leaves it in the low bits, from where a shift moves it into the exponent.
STOF_INLINE Vec exp_nonpositive(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693145752f;  // ln2 in two parts; the first has few bits, so the product is exact
  r = r - n * 1.42860677e-6f;
  Vec poly = r * 0.00139341003f + 0.00836347975f;
  poly = poly * r + 0.0416664593f;
  poly = poly * r + 0.166665748f;
  poly = poly * r + 0.5f;
  const Vec er = (poly * r) * r + r + 1.0f;
  const Vec two_n = (Vec)(((IVec)shifted << 23) + 0x3f800000);
  return x < -86.6f ? Vec{} : er * two_n;
}

// Lanes of the 16-bit word of a cell row: which of the kLanes keys starting at `first` it keeps.
STOF_INLINE IVec kept(int32_t word, int first) {
  IVec bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  return (splat(word >> first) & bit) != 0;
}

// Vectors a and b interleaved: lo is a0 b0 a1 b1 ..., hi continues it.
#if __has_builtin(__builtin_shufflevector)
#if defined(__AVX512F__)
STOF_INLINE Vec zip_lo(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
STOF_INLINE Vec zip_hi(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
STOF_INLINE Vec zip_lo(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
STOF_INLINE Vec zip_hi(Vec a, Vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
STOF_INLINE Vec zip_lo(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
STOF_INLINE Vec zip_hi(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif
#else
STOF_INLINE Vec zip_lo(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = i % 2 ? b[i / 2] : a[i / 2];
  return r;
}
STOF_INLINE Vec zip_hi(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = i % 2 ? b[(kLanes + i) / 2] : a[(kLanes + i) / 2];
  return r;
}
#endif

}  // namespace stof::cpu::STOF_ISA
