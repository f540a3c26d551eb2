// What the kernels use of the device, by name. Without nvcc, the tests' emulator supplies the same names and runs the kernels
// lane by lane on the CPU.
#pragma once

#ifndef __CUDACC__
#include <simt.h>

#include "problem.h"
#else

#include <mma.h>

#include <type_traits>

#include "common/device.cuh"
#include "problem.h"

namespace stof::bytetransformer {

using namespace stof::baselines;

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  const __half2 sum = __hadd2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}
// a * factor + term, rounded to fp16 once.
__device__ __forceinline__ uint32_t scale_pair(uint32_t a, float factor, float term) {
  const __half2 result = __hfma2(reinterpret_cast<const __half2&>(a), __float2half2_rn(factor), __float2half2_rn(term));
  return reinterpret_cast<const uint32_t&>(result);
}

__device__ __forceinline__ float exp_fast(float x) { return __expf(x); }
__device__ __forceinline__ float divide_fast(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ float rsqrt_of(float x) { return rsqrtf(x); }

template <typename T>
__device__ __forceinline__ T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T x, int lanes) {
  return __shfl_up_sync(kAllLanes, x, lanes);
}
template <typename T>
__device__ __forceinline__ T shuffle_from(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// c += a (16 x 8) * b (8 x 8), sums in fp16
__device__ __forceinline__ void multiply_k8(uint32_t (&c)[2], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};\n"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a0), "r"(a1), "r"(b));
}
// c += a (16 x 16) * b (16 x 8), sums in fp16
__device__ __forceinline__ void multiply_k16(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};\n"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A 16 x 16 sum of WMMA products, in fp16.
class CellSum {
 public:
  __device__ __forceinline__ CellSum() { nvcuda::wmma::fill_fragment(sum_, __float2half(0.f)); }

  // b is read as stored: b[k][n], or b[n][k] when kTransposed.
  template <bool kTransposed>
  __device__ __forceinline__ void add(const half_t* a, int a_step, const half_t* b, int b_step) {
    using namespace nvcuda::wmma;
    using Layout = std::conditional_t<kTransposed, col_major, row_major>;
    fragment<matrix_a, 16, 16, 16, half_t, row_major> left;
    fragment<matrix_b, 16, 16, 16, half_t, Layout> right;
    load_matrix_sync(left, a, a_step);
    load_matrix_sync(right, b, b_step);
    mma_sync(sum_, left, right, sum_);
  }
  __device__ __forceinline__ void store(half_t* to, int step) const {
    nvcuda::wmma::store_matrix_sync(to, sum_, step, nvcuda::wmma::mem_row_major);
  }

 private:
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, half_t> sum_;
};

}  // namespace stof::bytetransformer

#endif
