// The functions that launch kernels: one per template, defined by the source file that compiles it. None waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace stof::bolt {

template <typename T>
cudaError_t launch_gemm(const GemmProblem& p, cudaStream_t stream);

template <int kN0, int kN1>
cudaError_t launch_registers(const PersistentProblem& p, cudaStream_t stream);
template <int kN0, int kN1>
cudaError_t launch_shared(const PersistentProblem& p, cudaStream_t stream);

}  // namespace stof::bolt
