// What the kernels use of the device, by name. Without nvcc, the tests' emulator supplies the same names and runs the kernels
// lane by lane on the CPU.
#pragma once

#ifndef __CUDACC__
#include <simt_bolt.h>

#include "problem.h"
#else

#include "common/device.cuh"
#include "problem.h"

namespace stof::bolt {

using namespace stof::baselines;

__device__ __forceinline__ float erf_of(float x) { return erff(x); }

// c += a (16 x 8) * b (8 x 8), sums in fp32
__device__ __forceinline__ void multiply_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
// c += a (16 x 16) * b (16 x 8), sums in fp32
__device__ __forceinline__ void multiply_k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace stof::bolt

#endif
