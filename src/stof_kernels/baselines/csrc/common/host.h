// What the bindings of every competitor share: argument checks, allocation, the stream and launch errors, by the stable ABI.
//
// Apart from the headers of our own kernels on purpose: an edit there must not make the competitors' recorded numbers old.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace stof::baselines {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The caller wants the sentence, without torch's function, file and line before it.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, because the parts of a message cost time to make.
#define STOF_EXPECT(fits, ...)                         \
  do {                                                 \
    if (!(fits)) ::stof::baselines::fail(__VA_ARGS__); \
  } while (false)

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + ")";
}

inline std::string shape(const Tensor& t) { return text(t.sizes()); }

// A dense, 16-byte aligned tensor of this type and shape on the device of `like`.
inline void check(const char* op, const char* name, const Tensor& t, const Tensor& like, ScalarType dtype,
                  const std::vector<int64_t>& want) {
  STOF_EXPECT(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the first argument's device");
  STOF_EXPECT(t.scalar_type() == dtype, op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", it must be ",
              torch::headeronly::toString(dtype));
  bool fits = t.dim() == static_cast<int64_t>(want.size());
  for (size_t i = 0; fits && i < want.size(); ++i) fits = t.size(static_cast<int64_t>(i)) == want[i];
  STOF_EXPECT(fits, op, ": ", name, " has shape ", shape(t), ", it must be ", text(want));
  STOF_EXPECT(t.is_contiguous(), op, ": ", name, " must be contiguous");
  STOF_EXPECT(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, op, ": ", name, " must start at a multiple of 16 bytes");
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STOF_EXPECT(error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction, op,
              ": the library was built for another architecture than this GPU's (", cudaGetErrorString(error),
              "); build it with python -m stof_kernels.baselines.native");
  STOF_EXPECT(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

// Uninitialized dense tensor with the device and dtype (half or float) of `like`, straight from the allocator.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size(); i-- > 1;) stride[i - 1] = stride[i] * size[i];
  const int32_t dtype = like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_float16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(), dtype,
                                                         aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline int multiprocessors_of(int device) {
  int count = 0;
  check_launch("device query", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace stof::baselines
