// stof::build_cells on the CPU.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "check.h"
#include "format/cpu/build_cells.h"

namespace stof::bindings {
namespace {

void for_each(int64_t items, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, items, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_cells(Tensor keep) {
  STOF_CHECK(keep.scalar_type() == ScalarType::Bool, "build_cells: keep has dtype ",
             torch::headeronly::toString(keep.scalar_type()), ", it must be Bool");
  STOF_CHECK(keep.dim() == 4, "build_cells: keep has shape ", shape(keep),
             ", it must be (batch or 1, heads or 1, Lq, Lk)");
  format::Dense dense;
  dense.data = static_cast<const uint8_t*>(keep.const_data_ptr());
  for (int i = 0; i < 4; ++i) {
    dense.size[i] = keep.size(i);
    dense.stride[i] = keep.stride(i);
  }
  const int64_t items = dense.size[0] * dense.size[1] * ((dense.size[2] + 15) / 16);
  const auto list = [&](std::vector<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(keep, size, dtype);
  };
  Tensor ptr = list({items + 1}, ScalarType::Int);
  std::vector<int32_t> slot_ptr(items + 1);
  int32_t* ptr_data = static_cast<int32_t*>(ptr.mutable_data_ptr());
  const format::Totals totals = format::count_cells(dense, ptr_data, slot_ptr.data(), for_each);
  STOF_CHECK(totals.listed <= std::numeric_limits<int32_t>::max(), "build_cells: the mask has ",
             totals.listed, " non-empty cells, allowed are ", std::numeric_limits<int32_t>::max());

  Tensor col = list({totals.listed}, ScalarType::Int), slot = list({totals.listed}, ScalarType::Int);
  Tensor bits = list({totals.partial, 16}, ScalarType::Short), counts = list({4}, ScalarType::Long);
  format::fill_cells(dense, ptr_data, slot_ptr.data(), static_cast<int32_t*>(col.mutable_data_ptr()),
                     static_cast<int32_t*>(slot.mutable_data_ptr()),
                     static_cast<int16_t*>(bits.mutable_data_ptr()), for_each);
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  count[0] = totals.listed, count[1] = totals.partial, count[2] = totals.kept, count[3] = 0;
  return {ptr, col, slot, bits, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stof, CPU, m) { m.impl("build_cells", TORCH_BOX(&build_cells)); }

}  // namespace stof::bindings
