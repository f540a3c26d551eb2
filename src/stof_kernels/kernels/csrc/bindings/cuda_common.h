// What the CUDA bindings share: device, stream, launch errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"

namespace stof::bindings {

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction, op,
                  ": the CUDA library was built for another architecture than this GPU's (", cudaGetErrorString(error),
                  "); build the target of this GPU with stof_kernels.kernels.build");
  STD_TORCH_CHECK(error != cudaErrorInsufficientDriver, op, ": the NVIDIA driver is older than the CUDA ",
                  CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10, " that the library was built with; update it");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_launch("device query", cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace stof::bindings
