// Schemas of the operators, once for all devices: each device's library registers its kernels under them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(stof, m) {
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor ptr, Tensor col, Tensor slot, "
      "Tensor bits, "
      "Tensor counts, Tensor plan, SymInt q_len, SymInt kv_len, SymInt mask_batch, SymInt mask_heads, float "
      "scale, "
      "bool return_lse) -> (Tensor out, Tensor lse)");
  m.def(
      "build_cells(Tensor keep) -> (Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, "
      "Tensor counts)");
}
