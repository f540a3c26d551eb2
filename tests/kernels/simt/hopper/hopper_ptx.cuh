// Hopper's own instructions on the CPU, by simt.h, in place of csrc's header of this name: barriers in shared memory, tensor copies
// and products of a warpgroup, as late or as early as the hardware may do them.
//
// A copy lands when it is issued or when its barrier is looked at next, by a die. A product is done when its thread waits for it:
// operands that were overwritten before, registers or shared memory, show, and so do sums that are read or written before (they
// hold NaN meanwhile). Shared addresses are offsets into `shared_memory`.
#pragma once

#include <list>
#include <map>

#include "ptx.cuh"

// What a tensor map says: (batch, head, row, dim) halves, strides in elements; boxes of 64 dims and so many rows.
struct CUtensorMap {
  const _Float16* data;
  int64_t batch_step, head_step, row_step;
  int batch, heads, rows, dims, box_rows;
};

namespace simt {

struct Barrier {
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  std::vector<std::function<void()>> copies;  // on their way
};

struct Product {
  float *visible, *sums;
  int columns;
  const uint32_t* a;
  uint32_t b;
  bool add, transposed;
};

struct Hopper {
  std::map<uint32_t, Barrier> barriers;
  int events = 0;  // changes when some barrier may
  uint32_t die = 1;
  struct Thread {
    std::vector<Product> open;
    std::list<std::vector<Product>> groups;
    std::map<float*, std::vector<float>> sums;  // of running products, by where they will be seen
    std::map<float*, int> running;
  };
  std::vector<Thread> threads;
  int arrived = 0, complete = 0;  // at the barrier of all threads

  bool toss() { return (die = die * 1664525u + 1013904223u) >> 30 & 1; }
};
inline Hopper& hopper() {
  static Hopper h;
  return h;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void look(Barrier& barrier) {
  for (const auto& copy : barrier.copies) copy();
  barrier.copies.clear();
  if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.count, ++hopper().events;
}

inline _Float16 half_at(uint32_t address) {
  _Float16 x;
  std::memcpy(&x, stof::cuda::shared_memory + swizzled(address), 2);
  return x;
}

// One product of 16 rows: every lane's operands and sums lie as in the PTX manual.
inline void multiply_rows(Warp& warp) {
  const auto of = [&](int lane) -> const Product& { return *static_cast<const Product*>(warp.address[lane]); };
  const Product& first = of(0);
  const uint32_t from = (first.b & 0x3fff) << 4, step = (first.b >> 16 & 0x3fff) << 4;
  for (int lane = 0; lane < 32; ++lane)
    if (of(lane).b != first.b || of(lane).add != first.add) die("lanes disagree on a product");
  for (int row = 0; row < 16; ++row) {
    float a[16];
    for (int k = 0; k < 16; ++k) a[k] = half_of(of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k & 1);
    for (int n = 0; n < first.columns; ++n) {
      float& sum = of(row % 8 * 4 + n % 8 / 2).sums[n / 8 * 4 + row / 8 * 2 + (n & 1)];
      double x = first.add ? sum : 0.f;
      for (int k = 0; k < 16; ++k) {
        const uint32_t at = first.transposed ? from + k * 128 + n % 64 * 2 + n / 64 * step : from + n * 128 + k * 2;
        x += double(a[k]) * double(half_at(at));
      }
      sum = float(x);
    }
  }
}

}  // namespace simt

namespace stof::cuda {

inline simt::Barrier& barrier_at(uint32_t address) {
  if (address % 8 != 0 || !simt::hopper().barriers.count(address)) simt::die("no barrier there");
  return simt::hopper().barriers[address];
}
inline void barrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0 || barrier + 8 > kSharedMemory) simt::die("a barrier outside of shared memory");
  simt::hopper().barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) {
  simt::Barrier& b = barrier_at(barrier);
  if (--b.pending < 0) simt::die("more arrivals than a barrier takes");
  if (b.copies.empty()) simt::look(b);
  ++simt::hopper().events;
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  simt::Barrier& b = barrier_at(barrier);
  if (!b.copies.empty()) simt::look(b);
  return uint32_t(b.phase & 1) != parity;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) simt::wait_for_change(simt::hopper().events);
}
// Lanes of a warp may see different answers on the device as well.
inline bool barrier_ended(uint32_t barrier, uint32_t parity) { return simt::hopper().toss() && barrier_passed(barrier, parity); }

inline void land(uint32_t barrier, int bytes, std::function<void()> copy) {
  simt::Barrier& b = barrier_at(barrier);
  b.copies.push_back([=] {
    copy();
    if ((barrier_at(barrier).bytes -= bytes) < 0) simt::die("more bytes than a barrier was told of");
  });
  if (simt::hopper().toss()) simt::look(b);
  ++simt::hopper().events;
}
inline void copy_box(uint32_t dst, const CUtensorMap* map, uint32_t barrier, int dim, int row, int head, int batch) {
  const CUtensorMap m = *map;
  if (dst % 1024 != 0) simt::die("a box at an odd address");
  land(barrier, m.box_rows * 128, [=] {
    for (int r = 0; r < m.box_rows; ++r) {
      for (int d = 0; d < 64; ++d) {
        const bool inside = row + r < m.rows && dim + d < m.dims && head < m.heads && batch < m.batch;
        const _Float16 x = inside ? m.data[batch * m.batch_step + head * m.head_step + (row + r) * m.row_step + dim + d] : _Float16(0);
        std::memcpy(shared_memory + simt::swizzled(dst + r * 128 + d * 2), &x, 2);
      }
    }
  });
}
inline void copy_bytes(uint32_t dst, const void* src, int bytes, uint32_t barrier) {
  if (dst % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(src) % 16 != 0) simt::die("bytes not aligned");
  land(barrier, bytes, [=] { std::memcpy(shared_memory + dst, src, bytes); });
}
inline void prefetch_map(const CUtensorMap*) {}
template <int>
void take_registers() {}
template <int>
void give_registers() {}

inline simt::Hopper::Thread& running_here() { return simt::hopper().threads[simt::state().now->number]; }
inline void products_begin() { simt::end_loads(); }
inline void products_commit() {
  auto& self = running_here();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int kPending>
void products_wait() {
  auto& self = running_here();
  for (; self.groups.size() > kPending; self.groups.pop_front()) {
    for (simt::Product& product : self.groups.front()) {
      simt::collective({}, &product, simt::multiply_rows);
      if (--self.running[product.visible] > 0) continue;
      std::memcpy(product.visible, product.sums, product.columns / 2 * sizeof(float));
      self.sums.erase(product.visible);
    }
  }
  __syncwarp();
}
template <typename T, bool kTransposed, bool kFirst, int kCount>
void warpgroup_multiply(float (&d)[kCount], const uint32_t* a, uint64_t b, int add) {
  auto& self = running_here();
  std::vector<float>& sums = self.sums[d];
  if (sums.empty()) sums.assign(d, d + kCount);
  for (float& x : d) x = NAN;
  ++self.running[d];
  self.open.push_back({d, sums.data(), kCount * 2, a, uint32_t(b), !kFirst && add != 0, kTransposed});
}

inline void store_shared(uint32_t address, const int4& x) { std::memcpy(shared_memory + address, &x, 16); }
template <typename T>
T load_as(uint32_t address) {
  T x;
  std::memcpy(&x, shared_memory + address, sizeof x);
  return x;
}
inline int4 load_shared4(uint32_t address) { return load_as<int4>(address); }
inline int2 load_shared2(uint32_t address) { return load_as<int2>(address); }
inline uint32_t load_shared(uint32_t address) { return load_as<uint32_t>(address); }

template <int kThreads>
void all_arrive() {
  if (++simt::hopper().arrived == kThreads) ++simt::hopper().complete;
}
template <int kThreads>
void all_wait() {
  const int before = simt::hopper().complete;
  all_arrive<kThreads>();
  if (simt::hopper().complete == before) simt::wait_for_change(simt::hopper().complete);
}
template <int kCount>
void pin_registers(float (&)[kCount]) {}
inline uint32_t descriptor_low(uint32_t address, int block_stride) {
  return (address & 0x3ffff) >> 4 | static_cast<uint32_t>(block_stride >> 4) << 16;
}
inline uint64_t descriptor(uint32_t low) { return low; }

}  // namespace stof::cuda
