// The kernels around the matrix products: split with bias, masked softmax in memory, merge of heads, and those of the layer.
#pragma once

#include "device.cuh"

namespace stof::bytetransformer {

// Two neighbouring elements as one access.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <typename T>
__device__ __forceinline__ Pair<T> add(const Pair<T>& a, const Pair<T>& b) {
  return {from_float<T>(to_float(a.low) + to_float(b.low)), from_float<T>(to_float(a.high) + to_float(b.high))};
}

// qkv (batch, seq_len, 3 * heads * dim) + bias -> split (3, heads, batch, seq_len, dim). Grid (seq_len, batch), a thread a pair of
// heads * dim.
template <typename T>
__global__ void __launch_bounds__(1024) split_heads(const T* qkv, const T* bias, T* split, int heads, int dim) {
  const int64_t token = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x, tokens = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int pairs = heads * dim / 2, head = threadIdx.x * 2 / dim, column = threadIdx.x * 2 % dim;
  const Pair<T>* const from = reinterpret_cast<const Pair<T>*>(qkv) + token * 3 * pairs;
  const Pair<T>* const shift = reinterpret_cast<const Pair<T>*>(bias);
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    const int at = part * pairs + threadIdx.x;
    const int64_t row = (static_cast<int64_t>(part) * heads + head) * tokens + token;
    *reinterpret_cast<Pair<T>*>(split + row * dim + column) = add(from[at], shift[at]);
  }
}

// context (heads, batch, seq_len, dim) -> out (batch, seq_len, heads * dim); launched as split_heads.
template <typename T>
__global__ void __launch_bounds__(1024) merge_heads(const T* context, T* out, int heads, int dim) {
  const int64_t token = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x, tokens = static_cast<int64_t>(gridDim.x) * gridDim.y;
  const int head = threadIdx.x * 2 / dim, column = threadIdx.x * 2 % dim;
  reinterpret_cast<Pair<T>*>(out)[token * (heads * dim / 2) + threadIdx.x] =
      *reinterpret_cast<const Pair<T>*>(context + (head * tokens + token) * dim + column);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

// scores (heads, batch, seq_len, seq_len), already scaled -> softmax(scores - 10000 * (1 - mask)) in place. Grid batch * seq_len,
// block (32, heads): a warp a row, kept in registers of 32 * kItems columns, or with kItems = 0 in shared memory.
template <typename T, int kItems>
__global__ void __launch_bounds__(32 * kMaxHeads) masked_softmax(T* scores, const T* mask, int seq_len) {
  STOF_DYNAMIC_SHARED(shared);
  const int64_t row = static_cast<int64_t>(threadIdx.y) * gridDim.x + blockIdx.x;
  T* const score = scores + row * seq_len;
  const T* const keep = mask + static_cast<int64_t>(blockIdx.x) * seq_len;
  const int lane = threadIdx.x;
  const auto masked = [&](int col) { return to_float(score[col]) + (1.f - to_float(keep[col])) * -10000.f; };
  float top = -1e20f, sum = 0.f;
  if constexpr (kItems > 0) {
    float x[larger(kItems, 1)];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = lane + 32 * i;
      x[i] = col < seq_len ? masked(col) : -1e20f;
      top = fmaxf(top, x[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      x[i] = exp_fast(x[i] - top);
      sum += x[i];
    }
    sum = warp_sum(sum) + 1e-6f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int col = lane + 32 * i;
      if (col < seq_len) score[col] = from_float<T>(divide_fast(x[i], sum));
    }
  } else {
    float* const x = reinterpret_cast<float*>(shared) + threadIdx.y * seq_len;  // each lane reads what it wrote: no barrier
    for (int col = lane; col < seq_len; col += 32) {
      x[col] = masked(col);
      top = fmaxf(top, x[col]);
    }
    top = warp_max(top);
    for (int col = lane; col < seq_len; col += 32) {
      x[col] = exp_fast(x[col] - top);
      sum += x[col];
    }
    sum = warp_sum(sum) + 1e-6f;
    for (int col = lane; col < seq_len; col += 32) score[col] = from_float<T>(divide_fast(x[col], sum));
  }
}

// Sum over a block of whole warps; every thread gets it. `scratch` holds a float per warp.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  block_barrier();  // scratch may still be read from the last sum
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  block_barrier();
  float total = 0.f;
  for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) total += scratch[i];
  return total;
}

// LayerNorm(x + bias + residual) * gamma + beta, statistics in fp32. A block a token, a thread kPairs pairs of its columns.
template <typename T, int kPairs>
__global__ void __launch_bounds__(1024) bias_residual_norm(const T* x, const T* bias, const T* residual, const T* gamma, const T* beta, T* out, float epsilon) {
  __shared__ float scratch[32];
  const int pairs = blockDim.x * kPairs;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * pairs;
  const auto pair_of = [](const T* from, int64_t at) { return reinterpret_cast<const Pair<T>*>(from)[at]; };
  float2 value[kPairs];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    const Pair<T> a = pair_of(x, first + at), b = pair_of(bias, at), c = pair_of(residual, first + at);
    value[i] = make_float2(to_float(a.low) + to_float(b.low) + to_float(c.low), to_float(a.high) + to_float(b.high) + to_float(c.high));
    sum += value[i].x + value[i].y;
  }
  const float mean = block_sum(sum, scratch) / (2 * pairs);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    value[i].x -= mean, value[i].y -= mean;
    squares += value[i].x * value[i].x + value[i].y * value[i].y;
  }
  const float factor = rsqrt_of(block_sum(squares, scratch) / (2 * pairs) + epsilon);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    const Pair<T> g = pair_of(gamma, at), b = pair_of(beta, at);
    reinterpret_cast<Pair<T>*>(out)[first + at] = {from_float<T>(value[i].x * factor * to_float(g.low) + to_float(b.low)),
                                                   from_float<T>(value[i].y * factor * to_float(g.high) + to_float(b.high))};
  }
}

__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.f + tanh_of(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// x = gelu(x + bias) in place, x (rows, columns): a thread a pair.
template <typename T>
__global__ void bias_gelu(T* x, const T* bias, int64_t pairs, int row_pairs) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= pairs) return;
  const Pair<T> a = reinterpret_cast<const Pair<T>*>(x)[at], b = reinterpret_cast<const Pair<T>*>(bias)[at % row_pairs];
  reinterpret_cast<Pair<T>*>(x)[at] = {from_float<T>(gelu_tanh(to_float(a.low) + to_float(b.low))),
                                       from_float<T>(gelu_tanh(to_float(a.high) + to_float(b.high)))};
}

}  // namespace stof::bytetransformer
