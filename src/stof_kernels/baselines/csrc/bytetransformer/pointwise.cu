// Launches the kernels around the matrix products, in fp16 and in float.
#include "launch.h"
#include "pointwise.cuh"

namespace stof::bytetransformer {
namespace {

// Calls `run` with a value of the element type.
template <typename Run>
cudaError_t with_type(bool is_float, const Run& run) {
  if (is_float) run(float{});
  else run(half_t{});
  return cudaGetLastError();
}

template <typename T, int kItems>
void run_softmax(T* scores, const T* mask, int batch, int seq_len, int heads, cudaStream_t stream) {
  const int bytes = kItems > 0 ? 0 : 4 * heads * seq_len;
  if (bytes > 48 * 1024) cudaFuncSetAttribute(masked_softmax<T, kItems>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  masked_softmax<T, kItems><<<batch * seq_len, dim3(32, heads), bytes, stream>>>(scores, mask, seq_len);
}

}  // namespace

cudaError_t launch_split(const void* qkv, const void* bias, void* split, int batch, int seq_len, int heads, int head_dim, bool is_float,
                         cudaStream_t stream) {
  return with_type(is_float, [&](auto zero) {
    using T = decltype(zero);
    split_heads<T><<<dim3(seq_len, batch), heads * head_dim / 2, 0, stream>>>(static_cast<const T*>(qkv), static_cast<const T*>(bias),
                                                                              static_cast<T*>(split), heads, head_dim);
  });
}

cudaError_t launch_merge(const void* context, void* out, int batch, int seq_len, int heads, int head_dim, bool is_float,
                         cudaStream_t stream) {
  return with_type(is_float, [&](auto zero) {
    using T = decltype(zero);
    merge_heads<T><<<dim3(seq_len, batch), heads * head_dim / 2, 0, stream>>>(static_cast<const T*>(context), static_cast<T*>(out), heads,
                                                                              head_dim);
  });
}

cudaError_t launch_softmax(void* scores, const void* mask, int batch, int seq_len, int heads, bool is_float, cudaStream_t stream) {
  if (!fits_unfused(seq_len, heads)) return cudaErrorInvalidValue;
  return with_type(is_float, [&](auto zero) {
    using T = decltype(zero);
    T* const x = static_cast<T*>(scores);
    const T* const keep = static_cast<const T*>(mask);
    if (seq_len <= 128) run_softmax<T, 4>(x, keep, batch, seq_len, heads, stream);
    else if (seq_len <= 256) run_softmax<T, 8>(x, keep, batch, seq_len, heads, stream);
    else if (seq_len <= 512) run_softmax<T, 16>(x, keep, batch, seq_len, heads, stream);
    else if (seq_len <= kMaxRegisterKeys) run_softmax<T, 32>(x, keep, batch, seq_len, heads, stream);
    else run_softmax<T, 0>(x, keep, batch, seq_len, heads, stream);
  });
}

cudaError_t launch_norm(const void* x, const void* bias, const void* residual, const void* gamma, const void* beta, void* out, int rows,
                        int columns, float epsilon, bool is_float, cudaStream_t stream) {
  if (!norm_threads(columns)) return cudaErrorInvalidValue;
  return with_type(is_float, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel) {
      kernel<<<rows, norm_threads(columns), 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(bias),
                                                         static_cast<const T*>(residual), static_cast<const T*>(gamma),
                                                         static_cast<const T*>(beta), static_cast<T*>(out), epsilon);
    };
    if (norm_threads(columns) * 2 == columns) run(bias_residual_norm<T, 1>);
    else run(bias_residual_norm<T, 2>);
  });
}

cudaError_t launch_gelu(void* x, const void* bias, int64_t rows, int columns, bool is_float, cudaStream_t stream) {
  const int64_t pairs = rows * columns / 2;
  constexpr int kThreads = 256;
  return with_type(is_float, [&](auto zero) {
    using T = decltype(zero);
    bias_gelu<T><<<static_cast<unsigned>((pairs + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        static_cast<T*>(x), static_cast<const T*>(bias), pairs, columns / 2);
  });
}

}  // namespace stof::bytetransformer
