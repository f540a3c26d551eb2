// Checks at the door, worded as: argument, what it got, what is allowed.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
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
  const std::vector<int64_t> wanted(want);
  STOF_CHECK(fits, "sparse_attention: ", name, " has shape ", shape(t), ", it must be ", text(wanted),
             " (-1: any length)");
  STOF_CHECK(t.is_contiguous(), "sparse_attention: ", name, " must be contiguous");
}

}  // namespace stof::bindings
