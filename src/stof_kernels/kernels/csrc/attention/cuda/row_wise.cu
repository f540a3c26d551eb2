// Row-wise attention: a warp per query row walks the row's kept keys. For masks so thin that a tile of keys would be
// mostly empty; no tensor cores. A key is handled by head_dim / 8 lanes, so a warp works on several keys at once, each set
// of lanes with an online softmax of its own, joined in a fixed order at the end.
#include "common.cuh"

namespace stof::cuda {
namespace {

constexpr int kRowWarps = 4;
constexpr int kBatchCells = 32;  // cells unpacked at a time, one per lane
constexpr int kUnroll = 4;       // keys in flight per set of lanes

// Keys that row `row` of a strip keeps in up to 32 listed cells, in ascending order; returns how many.
__device__ __forceinline__ int unpack_keys(const CellLists& lists, int first, int end, int row, int lane, int* keys) {
  uint32_t word = 0;
  int col = 0;
  if (first + lane < end) {
    col = __ldg(lists.cell_col + first + lane);
    const int slot = __ldg(lists.cell_slot + first + lane);
    word = slot < 0 ? 0xffffu : __ldg(lists.cell_bits + static_cast<int64_t>(slot) * 16 + row);
  }
  int sum = __popc(word);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  int* to = keys + sum - __popc(word);
  for (; word != 0; word &= word - 1) *to++ = col * 16 + __ffs(word) - 1;
  __syncwarp();
  return __shfl_sync(0xffffffffu, sum, 31);
}

template <typename T>
__device__ __forceinline__ void unpack8(const uint4& raw, float (&x)[8]) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Element<T>::unpack(pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

struct RowState {
  float top, sum, o[8];
};

// Joins another softmax state of the same row; -inf tops are states without keys.
__device__ __forceinline__ void join(RowState& mine, const RowState& other) {
  const float top = fmaxf(mine.top, other.top), offset = top == -INFINITY ? 0.f : top;
  const float a = exp2_fast(mine.top - offset), b = exp2_fast(other.top - offset);
  mine.top = top;
  mine.sum = mine.sum * a + other.sum * b;
#pragma unroll
  for (int e = 0; e < 8; ++e) mine.o[e] = mine.o[e] * a + other.o[e] * b;
}

template <typename T, int kLanes, bool kBias>
__device__ __forceinline__ void attend(RowState& state, const Problem& p, const Instance& at, int row, const float (&q)[8],
                                       const int* keys, int count, int lane) {
  constexpr int kSets = 32 / kLanes;
  const int chunk = lane % kLanes;
  const bool active = chunk * 8 < p.head_dim;
  const T* k = static_cast<const T*>(p.k) + at.batch * p.k_stride.batch + at.kv_head * p.k_stride.head + chunk * 8;
  const T* v = static_cast<const T*>(p.v) + at.batch * p.v_stride.batch + at.kv_head * p.v_stride.head + chunk * 8;
  for (int base = 0; base < count; base += kSets * kUnroll) {
    int key[kUnroll];
    uint4 raw_k[kUnroll], raw_v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int index = base + u * kSets + lane / kLanes;
      key[u] = index < count ? keys[index] : -1;
      raw_k[u] = raw_v[u] = make_uint4(0, 0, 0, 0);
      if (key[u] >= 0 && active) {
        raw_k[u] = __ldg(reinterpret_cast<const uint4*>(k + key[u] * p.k_stride.row));
        raw_v[u] = __ldg(reinterpret_cast<const uint4*>(v + key[u] * p.v_stride.row));
      }
    }
    float score[kUnroll], top = state.top;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[8], dot = 0.f;
      unpack8<T>(raw_k[u], x);
#pragma unroll
      for (int e = 0; e < 8; ++e) dot = fmaf(q[e], x[e], dot);
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
      if (kBias && key[u] >= 0)
        dot += bias_log2<T>(p.bias, at.batch * p.bias.batch + at.head * p.bias.head + row * p.bias.row + key[u] * p.bias.key);
      score[u] = key[u] >= 0 ? dot : -INFINITY;
      top = fmaxf(top, score[u]);
    }
    const float offset = top == -INFINITY ? 0.f : top, factor = exp2_fast(state.top - offset);
    state.top = top;
    state.sum *= factor;
#pragma unroll
    for (int e = 0; e < 8; ++e) state.o[e] *= factor;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float weight = exp2_fast(score[u] - offset);
      float x[8];
      unpack8<T>(raw_v[u], x);
      state.sum += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) state.o[e] = fmaf(weight, x[e], state.o[e]);
    }
  }
}

template <typename T, int kLanes, bool kBias>
__global__ void __launch_bounds__(kRowWarps * 32)
    row_wise_kernel(const __grid_constant__ Problem p, const __grid_constant__ CellLists lists) {
  __shared__ int all_keys[kRowWarps][kBatchCells * 16];
  if (p.counts[3] != 0) {
    fill_with_nan<T>(p);
    return;
  }
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row_blocks = (p.q_len + kRowWarps - 1) / kRowWarps;
  const int heads = blockIdx.x / row_blocks, row = (blockIdx.x - heads * row_blocks) * kRowWarps + warp;
  if (row >= p.q_len) return;
  const int batch = p.heads.quotient(heads), head = heads - batch * p.q_heads;
  const Instance at{batch, head, p.shared.quotient(head)};
  const int plane = (p.mask_batch == 1 ? 0 : batch) * p.mask_heads + (p.mask_heads == 1 ? 0 : head);
  const int64_t strip = static_cast<int64_t>(plane) * lists.strips + row / 16;
  const int first = __ldg(lists.strip_ptr + strip), end = __ldg(lists.strip_ptr + strip + 1);

  const int chunk = lane % kLanes;
  float q[8] = {};
  if (chunk * 8 < p.head_dim) {
    const T* source = static_cast<const T*>(p.q) + at.batch * p.q_stride.batch + at.head * p.q_stride.head;
    unpack8<T>(__ldg(reinterpret_cast<const uint4*>(source + row * p.q_stride.row + chunk * 8)), q);
  }
  const float scale = p.q_flip != 0 ? -p.scale_log2 : p.scale_log2;
#pragma unroll
  for (int e = 0; e < 8; ++e) q[e] *= scale;

  RowState state{-INFINITY, 0.f, {}};
  int* keys = all_keys[warp];
  for (int cell = first; cell < end; cell += kBatchCells) {
    const int count = unpack_keys(lists, cell, end, row & 15, lane, keys);
    attend<T, kLanes, kBias>(state, p, at, row, q, keys, count, lane);
    __syncwarp();
  }
#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) {
    // Both partners must join in the same order, or they would disagree in the last bit.
    RowState other;
    other.top = __shfl_xor_sync(0xffffffffu, state.top, step);
    other.sum = __shfl_xor_sync(0xffffffffu, state.sum, step);
#pragma unroll
    for (int e = 0; e < 8; ++e) other.o[e] = __shfl_xor_sync(0xffffffffu, state.o[e], step);
    if (lane & step) {
      join(other, state);
      state = other;
    } else {
      join(state, other);
    }
  }
  const float inverse = state.sum == 0.f ? 0.f : reciprocal_fast(state.sum);
  if (lane < kLanes && chunk * 8 < p.head_dim) {
    T* out = static_cast<T*>(p.out) + at.batch * p.out_stride.batch + at.head * p.out_stride.head;
    uint4 packed;
    packed.x = Element<T>::pack(state.o[0] * inverse, state.o[1] * inverse);
    packed.y = Element<T>::pack(state.o[2] * inverse, state.o[3] * inverse);
    packed.z = Element<T>::pack(state.o[4] * inverse, state.o[5] * inverse);
    packed.w = Element<T>::pack(state.o[6] * inverse, state.o[7] * inverse);
    *reinterpret_cast<uint4*>(out + row * p.out_stride.row + chunk * 8) = packed;
  }
  if (lane == 0 && p.lse != nullptr)
    p.lse[lse_index(p, at, row)] = state.sum == 0.f ? -INFINITY : (state.top + log2_fast(state.sum)) * kLn2;
}

template <typename T, int kLanes>
void launch_lanes(const Problem& problem, const CellLists& lists, cudaStream_t stream) {
  const unsigned grid = (problem.q_len + kRowWarps - 1) / kRowWarps * problem.batch * problem.q_heads;
  if (problem.bias.data != nullptr)
    row_wise_kernel<T, kLanes, true><<<grid, kRowWarps * 32, 0, stream>>>(problem, lists);
  else
    row_wise_kernel<T, kLanes, false><<<grid, kRowWarps * 32, 0, stream>>>(problem, lists);
}

template <typename T>
void launch_type(const Problem& problem, const CellLists& lists, cudaStream_t stream) {
  if (problem.head_dim <= 32) launch_lanes<T, 4>(problem, lists, stream);
  else if (problem.head_dim <= 64) launch_lanes<T, 8>(problem, lists, stream);
  else if (problem.head_dim <= 128) launch_lanes<T, 16>(problem, lists, stream);
  else launch_lanes<T, 32>(problem, lists, stream);
}

}  // namespace

cudaError_t launch_row_wise(const Problem& problem, const CellLists& lists, cudaStream_t stream) {
  if (problem.is_bf16) launch_type<__nv_bfloat16>(problem, lists, stream);
  else launch_type<__half>(problem, lists, stream);
  return cudaGetLastError();
}

}  // namespace stof::cuda
