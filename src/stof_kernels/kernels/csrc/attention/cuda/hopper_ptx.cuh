// Hopper's own instructions (sm_90a): barriers in shared memory, bulk tensor copies, matrix products of a warpgroup.
#pragma once

#include <cuda.h>

#include "ptx.cuh"

namespace stof::cuda {

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns once the phase of that parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

// Whether the phase of that parity has ended, without waiting.
__device__ __forceinline__ bool barrier_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}\n"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended;
}

// A box of a (dim, row, head, batch) tensor to shared memory; what lies outside the tensor becomes zero.
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap* map, uint32_t barrier, int dim, int row, int head,
                                         int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(dim), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Consecutive bytes, a multiple of 16.
__device__ __forceinline__ void copy_bytes(uint32_t dst, const void* src, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Before the first product, and whenever registers that products use were written by other instructions.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Ints in shared memory, aligned to their own size.
__device__ __forceinline__ void store_shared(uint32_t address, const int4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ int4 load_shared4(uint32_t address) {
  int4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ int2 load_shared2(uint32_t address) {
  int2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(x) : "r"(address));
  return x;
}

// A barrier of all threads of the block that some only arrive at.
template <int kThreads>
__device__ __forceinline__ void all_arrive() {
  asm volatile("bar.arrive 1, %0;\n" ::"n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void all_wait() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(kThreads) : "memory");
}

// Keeps the compiler from moving or copying registers that a running product writes.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// Matrix descriptor of an operand in shared memory whose rows of 128 bytes are swizzled (as CU_TENSOR_MAP_SWIZZLE_128B writes
// them): the low half holds the address and, for a transposed operand, the bytes between its blocks of 64 columns, both in
// units of 16 bytes; the high half the bytes between groups of 8 rows, and the swizzle.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address, int block_stride) {
  return (address & 0x3ffff) >> 4 | static_cast<uint32_t>(block_stride >> 4) << 16;
}

__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  constexpr uint32_t kHigh = 1024 >> 4 | 1u << 30;
  return uint64_t{kHigh} << 32 | low;
}

#define STOF_REGS_8(c, r, i) c(r[i]), c(r[i + 1]), c(r[i + 2]), c(r[i + 3]), c(r[i + 4]), c(r[i + 5]), c(r[i + 6]), c(r[i + 7])
#define STOF_REGS_32(c, r, i) STOF_REGS_8(c, r, i), STOF_REGS_8(c, r, i + 8), STOF_REGS_8(c, r, i + 16), STOF_REGS_8(c, r, i + 24)

#define STOF_PRODUCT_64(type, constraint, transposed)                                                                 \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                             \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                 \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22," \
               " %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, " #transposed ";\n}\n" \
               : STOF_REGS_32(constraint, d, 0)                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define STOF_PRODUCT_128(type, constraint, transposed)                                                                \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                                             \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22," \
               " %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43," \
               " %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"     \
               " {%64, %65, %66, %67}, %68, add, 1, 1, " #transposed ";\n}\n"                                             \
               : STOF_REGS_32(constraint, d, 0), STOF_REGS_32(constraint, d, 32)                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

#define STOF_WRITTEN "=f"
#define STOF_ADDED "+f"
#define STOF_PRODUCT(size, constraint, transposed)                        \
  if constexpr (Element<T>::kIsHalf) size("f16", constraint, transposed); \
  else size("bf16", constraint, transposed)

// d = a * b, and d added if `add`: d is 64 rows x kCount * 2 columns over a warpgroup, a 64 x 16 in registers, b in shared
// memory: (columns, 16) as it lies, or transposed (16, columns). With kFirst nothing is added and nothing reads d, so that no
// value has to be put there while other products run.
template <typename T, bool kTransposed, bool kFirst, int kCount>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kCount], const uint32_t* a, uint64_t b, int add) {
  static_assert(kCount == 32 || kCount == 64, "64 or 128 columns");
  static_assert(!kFirst || !kTransposed, "not used");
  if constexpr (kCount == 32) {
    if constexpr (kTransposed) STOF_PRODUCT(STOF_PRODUCT_64, STOF_ADDED, 1);
    else if constexpr (kFirst) STOF_PRODUCT(STOF_PRODUCT_64, STOF_WRITTEN, 0);
    else STOF_PRODUCT(STOF_PRODUCT_64, STOF_ADDED, 0);
  } else {
    if constexpr (kTransposed) STOF_PRODUCT(STOF_PRODUCT_128, STOF_ADDED, 1);
    else if constexpr (kFirst) STOF_PRODUCT(STOF_PRODUCT_128, STOF_WRITTEN, 0);
    else STOF_PRODUCT(STOF_PRODUCT_128, STOF_ADDED, 0);
  }
}

}  // namespace stof::cuda
