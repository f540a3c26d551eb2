// Joins the parts of query tiles whose key lists were cut, in the order of the parts: the result does not depend on which
// part was done first.
#include "common.cuh"
#include "launch.h"

namespace stof::cuda {
namespace {

constexpr int kCombineRows = 8;  // rows of a block: few, so that the work of one tile spreads over the device
constexpr int kCombineThreads = 128;
constexpr int kLookers = 128;  // columns of blocks where the number of cut lists is not known at launch

template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ Problem p, const __grid_constant__ BlockLayout layout) {
  let_successor_start();
  wait_for_predecessor();
  if (!layout.exact && (layout.header[6] != 0 || p.counts[3] != 0)) return;  // the main kernel wrote NaN
  // With fixed capacity few blocks look for cut lists, of which there may be none.
  const int entries = layout.exact ? layout.combine_limit : min(__ldg(layout.header + 2), layout.combine_limit);
  const int chunks = p.head_dim / 8;
  for (int index = blockIdx.x; index < entries * layout.copies; index += gridDim.x) {
    const int entry_index = index / layout.copies, copy = index - entry_index * layout.copies;
    const int4 entry = __ldg(reinterpret_cast<const int4*>(layout.combines) + entry_index);
    const Instance at = instance_of(p, entry.w, copy);
    const int row0 = entry.x * layout.q_tile;

    for (int i = threadIdx.x; i < kCombineRows * chunks; i += kCombineThreads) {
      const int tile_row = blockIdx.y * kCombineRows + i / chunks, chunk = i % chunks;
      const int row = row0 + tile_row;
      if (row >= p.q_len) continue;
      const int64_t step = static_cast<int64_t>(layout.copies) * layout.q_tile;  // rows from one part to the next
      const int64_t first = (static_cast<int64_t>(entry.y) * layout.copies + copy) * layout.q_tile + tile_row;
      float top = -INFINITY;
      for (int part = 0; part < entry.z; ++part) top = fmaxf(top, layout.part_stat[first + part * step].x);
      const float offset = top == -INFINITY ? 0.f : top;
      float sum = 0.f, o[8] = {};
      for (int part = 0; part < entry.z; ++part) {
        const int64_t from = first + part * step;
        const float2 stat = layout.part_stat[from];
        const float factor = exp2_fast(stat.x - offset);
        sum = fmaf(stat.y, factor, sum);
        const float4* source = reinterpret_cast<const float4*>(layout.part_out + from * p.head_dim + chunk * 8);
        const float4 a = source[0], b = source[1];
        const float values[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) o[e] = fmaf(values[e], factor, o[e]);
      }
      const float scale = sum == 0.f ? 0.f : reciprocal_fast(sum);
      uint4 packed;
      packed.x = Element<T>::pack(o[0] * scale, o[1] * scale);
      packed.y = Element<T>::pack(o[2] * scale, o[3] * scale);
      packed.z = Element<T>::pack(o[4] * scale, o[5] * scale);
      packed.w = Element<T>::pack(o[6] * scale, o[7] * scale);
      T* out = static_cast<T*>(p.out) + at.batch * p.out_stride.batch + at.head * p.out_stride.head;
      *reinterpret_cast<uint4*>(out + row * p.out_stride.row + chunk * 8) = packed;
      if (chunk == 0 && p.lse != nullptr)
        p.lse[lse_index(p, at, row)] = sum == 0.f ? -INFINITY : (top + log2_fast(sum)) * kLn2;
    }
  }
}

}  // namespace

cudaError_t launch_combine(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(layout.combine_limit) * layout.copies;
  if (blocks == 0) return cudaSuccess;
  const int64_t columns = layout.exact || blocks < kLookers ? blocks : kLookers;
  const dim3 grid(static_cast<unsigned>(columns), layout.q_tile / kCombineRows);
  const auto kernel = problem.is_bf16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  return launch_overlapping(kernel, grid, kCombineThreads, 0, stream, problem, layout);
}

}  // namespace stof::cuda
