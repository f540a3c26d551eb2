// What the bindings of both devices share: checks at the door, worded as argument, what it got, what is allowed; tensors
// straight from the allocator; calls that are checked once and packed for repeats.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace stof::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Torch's own check puts function, file and line before the message; the caller wants the sentence. A macro,
// because the parts of a message cost time to make.
#define STOF_CHECK(fits, ...)                         \
  do {                                                \
    if (!(fits)) ::stof::bindings::fail(__VA_ARGS__); \
  } while (false)

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + ")";
}

inline std::string shape(const Tensor& t) { return text(t.sizes()); }

// A list of the mask: contiguous, of one dtype and exactly this shape; -1 allows any length.
inline void check_list(const char* name, const Tensor& t, ScalarType dtype,
                       std::initializer_list<int64_t> want) {
  STOF_CHECK(t.scalar_type() == dtype, "sparse_attention: ", name, " has dtype ",
             torch::headeronly::toString(t.scalar_type()), ", it must be ",
             torch::headeronly::toString(dtype));
  bool fits = t.dim() == int64_t(want.size());
  int64_t i = 0;
  for (int64_t size : want) {
    fits = fits && (size == -1 || t.size(i) == size);
    ++i;
  }
  STOF_CHECK(fits, "sparse_attention: ", name, " has shape ", shape(t), ", it must be ",
             text(std::vector<int64_t>(want)), " (-1: any length)");
  STOF_CHECK(t.is_contiguous(), "sparse_attention: ", name, " must be contiguous");
}

// Uninitialized tensor on a device. Straight to the allocator: going through the dispatcher, as stable::new_empty does,
// costs most of a microsecond a call.
inline Tensor new_tensor(std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride, int32_t dtype,
                         int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(), stride.begin(),
                                                         dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// A packed call: `Call`, plain data that holds everything about a call but its q, k, v, bias and scale, as an int64 tensor on
// the CPU that owns the mask's lists it points at. Its first word is `kPacked`, its second the call's `captured`.
constexpr int64_t kPacked = 0x53544f4643414c4c;

template <typename Call>
Tensor pack(const Call& call, std::vector<Tensor> lists) {
  static_assert(std::is_trivially_copyable_v<Call> && sizeof(Call) % sizeof(int64_t) == 0);
  struct Owner {
    Call call;
    std::vector<Tensor> lists;
  };
  Owner* owner = new Owner{call, std::move(lists)};
  return torch::stable::from_blob(&owner->call, {int64_t(sizeof(Call) / sizeof(int64_t))}, {1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long,
                                  [owner](void*) { delete owner; });
}

template <typename Call>
Call& unpack(const Tensor& packed) {
  STOF_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Long && packed.dim() == 1 &&
                 packed.size(0) == int64_t(sizeof(Call) / sizeof(int64_t)),
             "attend: packed has shape ", shape(packed), ", it must be what pack_call returned");
  Call& call = *static_cast<Call*>(packed.data_ptr());
  STOF_CHECK(call.magic == kPacked, "attend: packed is not what pack_call returned");
  return call;
}

// Whether a tensor has this dtype, device and shape.
inline bool is_like(const Tensor& t, ScalarType dtype, int32_t device_index, const int64_t (&size)[4]) {
  if (t.scalar_type() != dtype || t.get_device_index() != device_index || t.dim() != 4) return false;
  const auto sizes = t.sizes();
  return sizes[0] == size[0] && sizes[1] == size[1] && sizes[2] == size[2] && sizes[3] == size[3];
}

// What `attend` says where the tensors are not those of the packed call: the caller checks and packs anew.
constexpr const char* kOtherCall = "attend: not the call that was packed";

// The bias of a full (B, Hq, Lq, Lk) array: element strides, 0 where it is broadcast. Missing leading dimensions are
// broadcast, too. False if it does not fit.
inline bool broadcast_strides(const Tensor& bias, const int64_t (&full)[4], int64_t (&stride)[4]) {
  const int64_t dims = bias.dim();
  if (dims > 4) return false;
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t own = i - (4 - dims);
    stride[i] = 0;
    if (own < 0 || bias.size(own) == 1) continue;
    if (bias.size(own) != full[i]) return false;
    stride[i] = bias.stride(own);
  }
  return true;
}

}  // namespace stof::bindings
