// The kernels for short calls on Hopper on the CPU, for ctypes: fp16, one cluster after the other. kernels.inc is made by the
// test: EMULATED(number, arguments of HopperSplitConfig) for each kernel.
#include "launch.h"
#include "hopper_split_run.cuh"

namespace stof::cuda {

bool make_hopper_maps(const Problem& p, HopperMaps* maps) {
  const auto map_of = [&](const void* data, const Strides& step, int rows, int heads, int box_rows) {
    return CUtensorMap{static_cast<const _Float16*>(data), step.batch, step.head, step.row, p.batch, heads, rows, p.head_dim, box_rows};
  };
  *maps = {map_of(p.q, p.q_stride, p.q_len, p.q_heads, 64), map_of(p.k, p.k_stride, p.kv_len, p.kv_heads, 16),
           map_of(p.k, p.k_stride, p.kv_len, p.kv_heads, 64), map_of(p.v, p.v_stride, p.kv_len, p.kv_heads, 16),
           map_of(p.v, p.v_stride, p.kv_len, p.kv_heads, 64)};
  return true;
}

}  // namespace stof::cuda

using namespace stof::cuda;

extern "C" {

void set_order(int descending, int die, int late) {
  simt::state().descending = descending != 0, simt::hopper().die = uint32_t(die), late_block = late;
}

// sizes: batch, q_heads, kv_heads, q_len, kv_len, head_dim, items, multiprocessors, exact. q, k, v: (batch, heads, len, dim), out:
// (batch, q_len, heads, dim), one mask for all.
int run(int kernel, const void* q, const void* k, const void* v, void* out, float* lse, const int* header, const int* items,
        const int* col, const uint32_t* bits, float* part_out, float* part_stat, const int* sizes, double scale) {
  Problem p{};
  p.q = q, p.k = k, p.v = v, p.out = out, p.lse = lse;
  p.batch = sizes[0], p.q_heads = sizes[1], p.kv_heads = sizes[2], p.q_len = sizes[3], p.kv_len = sizes[4], p.head_dim = sizes[5];
  const auto strides = [&](int heads, int rows) {
    return Strides{int64_t{heads} * rows * p.head_dim, int64_t{rows} * p.head_dim, p.head_dim};
  };
  const int64_t counts[4] = {};
  p.counts = counts;
  p.q_stride = strides(p.q_heads, p.q_len), p.k_stride = p.v_stride = strides(p.kv_heads, p.kv_len);
  p.out_stride = {int64_t{p.q_len} * p.q_heads * p.head_dim, p.head_dim, int64_t{p.q_heads} * p.head_dim};
  p.mask_batch = p.mask_heads = 1;
  p.heads = FastDivisor(p.q_heads), p.planes = FastDivisor(1), p.shared = FastDivisor(p.q_heads / p.kv_heads);
  p.scale_log2 = float(std::fabs(scale) * 1.4426950408889634), p.q_flip = scale < 0 ? 0x80008000u : 0u;
  BlockLayout layout{};
  layout.header = header, layout.items = items, layout.col = col, layout.bits = bits, layout.q_tile = 64;
  layout.item_limit = sizes[6], layout.exact = sizes[8] != 0, layout.copies = p.batch * p.q_heads;
  layout.part_out = part_out, layout.part_stat = reinterpret_cast<float2*>(part_stat);
  layout.group_blocks = FastDivisor(std::max(1, layout.item_limit * layout.copies));
  layout.group_copies = layout.last_copies = FastDivisor(layout.copies);
  device_units = sizes[7];
#define EMULATED(number, ...) \
  if (kernel == number) return launch_hopper_split_as<HopperSplitConfig<__half, __VA_ARGS__>>(p, layout, nullptr);
#include "kernels.inc"
#undef EMULATED
  return -1;
}

int shared_bytes(int kernel) {
#define EMULATED(number, ...) \
  if (kernel == number) return HopperSplitConfig<__half, __VA_ARGS__>::kSharedBytes;
#include "kernels.inc"
#undef EMULATED
  return 0;
}

}  // extern "C"
