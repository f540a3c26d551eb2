// The functions that launch kernels, one per source file and step. None waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace stof::bytetransformer {

cudaError_t launch_whole(const ShortProblem& p, cudaStream_t stream);  // fits_whole
cudaError_t launch_slabs(const ShortProblem& p, cudaStream_t stream);  // fits_slabs
cudaError_t launch_grouped(const LongProblem& p, int multiprocessors, cudaStream_t stream);  // fits_long; after the split

// Element types: fp16, or float where `is_float`.
cudaError_t launch_split(const void* qkv, const void* bias, void* split, int batch, int seq_len, int heads, int head_dim, bool is_float,
                         cudaStream_t stream);
cudaError_t launch_merge(const void* context, void* out, int batch, int seq_len, int heads, int head_dim, bool is_float,
                         cudaStream_t stream);
cudaError_t launch_softmax(void* scores, const void* mask, int batch, int seq_len, int heads, bool is_float, cudaStream_t stream);
cudaError_t launch_norm(const void* x, const void* bias, const void* residual, const void* gamma, const void* beta, void* out, int rows,
                        int columns, float epsilon, bool is_float, cudaStream_t stream);
cudaError_t launch_gelu(void* x, const void* bias, int64_t rows, int columns, bool is_float, cudaStream_t stream);

}  // namespace stof::bytetransformer
