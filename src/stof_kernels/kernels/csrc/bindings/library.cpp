// Schemas of the operators, once for all devices: each device's library registers its kernels under them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(stof, m) {
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor ptr, Tensor col, Tensor slot, "
      "Tensor bits, "
      "Tensor counts, Tensor plan, SymInt q_len, SymInt kv_len, SymInt mask_batch, SymInt mask_heads, float "
      "scale, "
      "bool return_lse) -> (Tensor out, Tensor lse)");
  // The same call in two steps, for callers that repeat it: what depends on shapes, mask and plan alone is checked and
  // packed once, so that a repeat passes few arguments.
  m.def(
      "pack_call(Tensor q, Tensor k, Tensor v, Tensor ptr, Tensor col, Tensor slot, Tensor bits, Tensor counts, Tensor plan, "
      "SymInt q_len, SymInt kv_len, SymInt mask_batch, SymInt mask_heads) -> Tensor");
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor packed, Tensor? bias=None, float? scale=None) -> Tensor");
  m.def(
      "attend_lse(Tensor q, Tensor k, Tensor v, Tensor packed, Tensor? bias=None, float? scale=None) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "build_cells(Tensor keep) -> (Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, "
      "Tensor counts)");
}
