// The Hopper kernel on the CPU, for ctypes: fp16, one block after the other. kernels.inc is made by the test: EMULATED(number,
// arguments of HopperConfig) for each kernel.
#include "hopper_run.cuh"

using namespace stof::cuda;

namespace {

CUtensorMap map_of(const void* data, const Problem& p, const Strides& step, int rows, int heads, int box_rows) {
  return {static_cast<const _Float16*>(data), step.batch, step.head, step.row, p.batch, heads, rows, p.head_dim, box_rows};
}

template <class C>
void run_as(const Problem& p, BlockLayout layout, int blocks) {
  static_assert(C::kSharedBytes <= kSharedMemory);
  layout.group_copies = regrouped(p, layout, C::kSets * blocks).group_copies;
  const HopperMaps maps{map_of(p.q, p, p.q_stride, p.q_len, p.q_heads, 64), map_of(p.k, p, p.k_stride, p.kv_len, p.kv_heads, 16),
                        map_of(p.k, p, p.k_stride, p.kv_len, p.kv_heads, 64), map_of(p.v, p, p.v_stride, p.kv_len, p.kv_heads, 16),
                        map_of(p.v, p, p.v_stride, p.kv_len, p.kv_heads, 64)};
  for (unsigned block = 0; block < unsigned(blocks); ++block) {
    simt::Hopper& hopper = simt::hopper();
    hopper.barriers.clear(), hopper.arrived = 0;
    hopper.threads = std::vector<simt::Hopper::Thread>(C::kThreads);
    std::fill(shared_memory, shared_memory + kSharedMemory, 0x7e);  // halves are NaN
    simt::launch({1}, {C::kThreads}, [&] {
      blockIdx.x = block, gridDim.x = blocks;
      hopper_kernel<C>(p, layout, maps);
    });
  }
}

}  // namespace

extern "C" {

void set_order(int descending, int die) { simt::state().descending = descending != 0, simt::hopper().die = uint32_t(die); }

// sizes: batch, q_heads, kv_heads, q_len, kv_len, head_dim, items, q_tile, blocks, counted, leading. q, k, v: (batch, heads, len, dim), out:
// (batch, q_len, heads, dim), one mask for all.
void run(int kernel, const void* q, const void* k, const void* v, void* out, float* lse, const int* items, const int* col,
         const uint32_t* bits, const int* sizes, double scale) {
  Problem p{};
  p.q = q, p.k = k, p.v = v, p.out = out, p.lse = lse;
  p.batch = sizes[0], p.q_heads = sizes[1], p.kv_heads = sizes[2], p.q_len = sizes[3], p.kv_len = sizes[4], p.head_dim = sizes[5];
  const auto strides = [&](int heads, int rows) {
    return Strides{int64_t{heads} * rows * p.head_dim, int64_t{rows} * p.head_dim, p.head_dim};
  };
  p.q_stride = strides(p.q_heads, p.q_len), p.k_stride = p.v_stride = strides(p.kv_heads, p.kv_len);
  p.out_stride = {int64_t{p.q_len} * p.q_heads * p.head_dim, p.head_dim, int64_t{p.q_heads} * p.head_dim};
  p.mask_batch = p.mask_heads = 1;
  p.heads = FastDivisor(p.q_heads), p.planes = FastDivisor(1), p.shared = FastDivisor(p.q_heads / p.kv_heads);
  p.scale_log2 = float(scale * 1.4426950408889634);
  BlockLayout layout{};
  int taken = 0, header[kHeaderInts] = {sizes[6]};
  header[7] = sizes[10];
  layout.header = header, layout.items = items, layout.col = col, layout.bits = bits, layout.q_tile = sizes[7], layout.item_limit = sizes[6];
  layout.exact = true, layout.copies = p.batch * p.q_heads, layout.next_unit = sizes[9] ? &taken : nullptr;
#define EMULATED(number, ...) \
  if (kernel == number) run_as<HopperConfig<__half, __VA_ARGS__>>(p, layout, sizes[8]);
#include "kernels.inc"
#undef EMULATED
}

int shared_bytes(int kernel) {
#define EMULATED(number, ...) \
  if (kernel == number) return HopperConfig<__half, __VA_ARGS__>::kSharedBytes;
#include "kernels.inc"
#undef EMULATED
  return 0;
}
}
