// What the CUDA bindings share: device, stream, launch errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <vector>

#include "check.h"

namespace stof::bindings {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline cudaStream_t current_stream(const Tensor& t) { return current_stream(t.get_device_index()); }

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction, op,
                  ": the CUDA library was built for another architecture than this GPU's (", cudaGetErrorString(error),
                  "); build the target of this GPU with stof_kernels.kernels.build");
  STD_TORCH_CHECK(error != cudaErrorInsufficientDriver, op, ": the NVIDIA driver is older than the CUDA ",
                  CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10, " that the library was built with; update it");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

// What the host side needs to know of a device, asked once.
struct DeviceNumbers {
  int multiprocessors, l2_bytes;
};

inline DeviceNumbers numbers_of(int device) {
  static std::mutex mutex;
  static std::vector<DeviceNumbers> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(device + 1, DeviceNumbers{0, 0});
  DeviceNumbers& numbers = known[device];
  if (numbers.multiprocessors == 0) {
    check_launch("device query", cudaDeviceGetAttribute(&numbers.l2_bytes, cudaDevAttrL2CacheSize, device));
    check_launch("device query", cudaDeviceGetAttribute(&numbers.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  }
  return numbers;
}

inline Tensor new_on_cuda(int32_t device, std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride,
                          int32_t dtype) {
  return new_tensor(size, stride, dtype, aoti_torch_device_type_cuda(), device);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace stof::bindings
