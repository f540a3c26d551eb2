// stof::sparse_attention on the CPU: checks its arguments, allocates the results, hands plain structs to the
// driver.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "attention/cpu/driver.h"
#include "attention/cpu/variant.h"
#include "check.h"

namespace stof::bindings {
namespace {

using namespace stof::cpu;

Array4 array_of(const Tensor& t) {
  Array4 a;
  a.data = t.const_data_ptr();
  a.element = t.scalar_type() == ScalarType::BFloat16 ? Element::bf16 : Element::f32;
  for (int i = 0; i < 4; ++i) a.stride[i] = t.stride(i);
  return a;
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, int64_t q_len, int64_t kv_len) {
  const ScalarType dtype = q.scalar_type();
  STOF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "sparse_attention: q has dtype ",
             torch::headeronly::toString(dtype), ", on the CPU it must be Float or BFloat16");
  STOF_CHECK(q.dim() == 4, "sparse_attention: q has shape ", shape(q), ", it must be (B, Hq, Lq, D)");
  const auto check_kv = [&](const char* name, const Tensor& t) {
    STOF_CHECK(t.scalar_type() == dtype, "sparse_attention: ", name, " has dtype ",
               torch::headeronly::toString(t.scalar_type()), ", it must be q's, ",
               torch::headeronly::toString(dtype));
    STOF_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(3) == q.size(3), "sparse_attention: ", name,
               " has shape ", shape(t), ", it must be (B, Hkv, Lk, D) with B and D of q ", shape(q));
  };
  check_kv("k", k);
  check_kv("v", v);
  STOF_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "sparse_attention: v has shape ", shape(v),
             ", it must be that of k, ", shape(k));
  STOF_CHECK(q.size(1) == 0 || (k.size(1) > 0 && q.size(1) % k.size(1) == 0), "sparse_attention: q has ",
             q.size(1), " heads, that must be a multiple of the ", k.size(1), " heads of k and v");
  const int64_t dim = q.size(3);
  STOF_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "sparse_attention: the head dim is ", dim,
             ", it must be a multiple of 8 from 8 to 256");
  STOF_CHECK(q.size(2) == q_len, "sparse_attention: q has ", q.size(2), " queries, but the mask is for ",
             q_len);
  STOF_CHECK(k.size(2) == kv_len, "sparse_attention: k has ", k.size(2), " keys, but the mask is for ",
             kv_len);
}

// The bias as a full (B, Hq, Lq, Lk) array; broadcast dimensions have stride 0.
Array4 bias_of(const Tensor& bias, const Tensor& q, int64_t kv_len) {
  const ScalarType dtype = bias.scalar_type();
  STOF_CHECK(dtype == ScalarType::Float || dtype == q.scalar_type(), "sparse_attention: bias has dtype ",
             torch::headeronly::toString(dtype), ", it must be q's or Float");
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), kv_len};
  Array4 a;
  STOF_CHECK(bias.get_device_index() == q.get_device_index() && broadcast_strides(bias, full, a.stride),
             "sparse_attention: bias has shape ", shape(bias), ", it must be on q's device and broadcastable to (",
             full[0], ", ", full[1], ", ", full[2], ", ", full[3], ")");
  a.data = bias.const_data_ptr();
  a.element = dtype == ScalarType::BFloat16 ? Element::bf16 : Element::f32;
  return a;
}

Mask mask_of(const Tensor& q, int64_t kv_len, const Tensor& ptr, const Tensor& col, const Tensor& slot,
             const Tensor& bits, int64_t mask_batch, int64_t mask_heads) {
  STOF_CHECK(mask_batch == 1 || mask_batch == q.size(0), "sparse_attention: mask_batch is ", mask_batch,
             ", it must be 1 or the batch of q, ", q.size(0));
  STOF_CHECK(mask_heads == 1 || mask_heads == q.size(1), "sparse_attention: mask_heads is ", mask_heads,
             ", it must be 1 or the heads of q, ", q.size(1));
  Mask m;
  m.batch = mask_batch;
  m.heads = mask_heads;
  m.strips = (q.size(2) + kCell - 1) / kCell;
  m.cells = (kv_len + kCell - 1) / kCell;
  m.tail_keys = kv_len - (m.cells - 1) * kCell;
  check_list("ptr", ptr, ScalarType::Int, {mask_batch * mask_heads * m.strips + 1});
  check_list("col", col, ScalarType::Int, {-1});
  check_list("slot", slot, ScalarType::Int, {col.size(0)});
  check_list("bits", bits, ScalarType::Short, {-1, kCell});
  m.ptr = static_cast<const int32_t*>(ptr.const_data_ptr());
  m.col = static_cast<const int32_t*>(col.const_data_ptr());
  m.slot = static_cast<const int32_t*>(slot.const_data_ptr());
  m.bits = static_cast<const int16_t*>(bits.const_data_ptr());
  m.slots = bits.size(0);
  m.listed = col.size(0);
  return m;
}

// [kernel, q_tile, kv_chunk, 0]; -1 leaves the choice to the kernel.
Plan plan_of(const Problem& p, const int64_t* word, const int64_t* counts) {
  Plan chosen = default_plan(p, counts[0], counts[2]);
  if (word[0] == -1) return chosen;
  STOF_CHECK(word[0] == 0 || word[0] == 1, "sparse_attention: plan[0] is ", word[0],
             ", on the CPU it must be 0 (row_wise), 1 (block_wise) or -1 (default)");
  chosen.kernel = Kernel(word[0]);
  if (chosen.kernel == Kernel::row_wise) return chosen;
  STOF_CHECK(word[1] == -1 || word[1] == kCell, "sparse_attention: plan[1] (query tile) is ", word[1],
             ", block_wise on the CPU takes 16 or -1 (default)");
  if (word[2] == -1) return chosen;
  STOF_CHECK(word[2] >= kCell && word[2] <= kMaxChunkCells * kCell && word[2] % kCell == 0,
             "sparse_attention: plan[2] (keys per step) is ", word[2],
             ", it must be a multiple of 16 from 16 to ", kMaxChunkCells * kCell, " or -1 (default)");
  chosen.chunk_cells = int(word[2] / kCell);
  return chosen;
}

Workers torch_threads() {
  return {int(torch::stable::get_num_threads()), [](int count, const std::function<void(int)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(int(worker));
            });
          }};
}

// A call that was checked, but for its tensors.
struct Call {
  int64_t magic = kPacked, captured = 0;
  Problem problem;  // without q, k, v, bias, scale and results
  const int64_t *counts = nullptr, *plan = nullptr;
  int64_t q_size[4], k_size[4];
  double default_scale;
  ScalarType dtype = ScalarType::Undefined;
  int threads = 0;
};

Call checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ptr, const Tensor& col, const Tensor& slot,
             const Tensor& bits, const Tensor& counts, const Tensor& plan, int64_t q_len, int64_t kv_len,
             int64_t mask_batch, int64_t mask_heads) {
  check_inputs(q, k, v, q_len, kv_len);
  check_list("counts", counts, ScalarType::Long, {4});
  check_list("plan", plan, ScalarType::Long, {4});
  Call call;
  Problem& p = call.problem;
  p.batch = q.size(0), p.heads = q.size(1), p.kv_heads = k.size(1);
  p.q_len = q_len, p.kv_len = kv_len, p.dim = q.size(3);
  p.mask = mask_of(q, kv_len, ptr, col, slot, bits, mask_batch, mask_heads);
  call.counts = static_cast<const int64_t*>(counts.const_data_ptr());
  call.plan = static_cast<const int64_t*>(plan.const_data_ptr());
  for (int i = 0; i < 4; ++i) call.q_size[i] = q.size(i), call.k_size[i] = k.size(i);
  call.dtype = q.scalar_type();
  call.default_scale = 1.0 / std::sqrt(double(p.dim));
  call.threads = int(torch::stable::get_num_threads());
  return call;
}

struct Results {
  Tensor out;
  std::optional<Tensor> lse;
};

Results run(const Call& call, const Tensor& q, Tensor k, Tensor v, const std::optional<Tensor>& bias, double scale,
            bool return_lse) {
  Problem p = call.problem;
  p.scale = float(scale);
  if (bias.has_value()) p.bias = bias_of(*bias, q, p.kv_len);
  const int32_t cpu = aoti_torch_device_type_cpu();
  const int64_t row = p.heads * p.dim;
  const bool bf16 = call.dtype == ScalarType::BFloat16;
  Results results{new_tensor({p.batch, p.heads, p.q_len, p.dim}, {p.q_len * row, p.dim, row, 1},
                             bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(), cpu, 0),
                  std::nullopt};
  if (return_lse)
    results.lse = new_tensor({p.batch, p.heads, p.q_len}, {p.heads * p.q_len, p.q_len, 1}, aoti_torch_dtype_float32(), cpu, 0);
  p.out = results.out.mutable_data_ptr();
  p.lse = return_lse ? static_cast<float*>(results.lse->mutable_data_ptr()) : nullptr;
  p.q = array_of(q);
  const Plan chosen = plan_of(p, call.plan, call.counts);
  if (call.counts[3] != 0) {
    poison(p);
    return results;
  }
  const std::string wrong = check_lists(p.mask);
  STOF_CHECK(wrong.empty(), "sparse_attention: corrupt mask: ", wrong);
  if (chosen.kernel == Kernel::row_wise) {
    // It reads rows where they lie, so their elements must be neighbours.
    if (k.stride(3) != 1) k = torch::stable::contiguous(k);
    if (v.stride(3) != 1) v = torch::stable::contiguous(v);
  }
  p.k = array_of(k);
  p.v = array_of(v);
  attention(p, chosen, torch_threads());
  return results;
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                            Tensor ptr, Tensor col, Tensor slot, Tensor bits, Tensor counts,
                                            Tensor plan, int64_t q_len, int64_t kv_len, int64_t mask_batch,
                                            int64_t mask_heads, double scale, bool return_lse) {
  const Call call = checked(q, k, v, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads);
  Results results = run(call, q, k, v, bias, scale, return_lse);
  if (!return_lse) results.lse = new_tensor({0}, {1}, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0);
  return {results.out, *results.lse};
}

Tensor pack_call(Tensor q, Tensor k, Tensor v, Tensor ptr, Tensor col, Tensor slot, Tensor bits, Tensor counts, Tensor plan,
                 int64_t q_len, int64_t kv_len, int64_t mask_batch, int64_t mask_heads) {
  const Call call = checked(q, k, v, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads);
  return pack(call, {ptr, col, slot, bits, counts, plan});
}

Results repeat(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& packed, const std::optional<Tensor>& bias,
               std::optional<double> scale, bool return_lse) {
  const Call& call = unpack<Call>(packed);
  const int32_t device = q.get_device_index();
  STOF_CHECK(is_like(q, call.dtype, device, call.q_size) && is_like(k, call.dtype, device, call.k_size) &&
                 is_like(v, call.dtype, device, call.k_size) && call.threads == int(torch::stable::get_num_threads()),
             kOtherCall);
  return run(call, q, k, v, bias, scale.value_or(call.default_scale), return_lse);
}

Tensor attend(Tensor q, Tensor k, Tensor v, Tensor packed, std::optional<Tensor> bias, std::optional<double> scale) {
  return repeat(q, k, v, packed, bias, scale, false).out;
}

std::tuple<Tensor, Tensor> attend_lse(Tensor q, Tensor k, Tensor v, Tensor packed, std::optional<Tensor> bias,
                                      std::optional<double> scale) {
  Results results = repeat(q, k, v, packed, bias, scale, true);
  return {results.out, *results.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stof, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("pack_call", TORCH_BOX(&pack_call));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_lse", TORCH_BOX(&attend_lse));
}

}  // namespace stof::bindings

// Reached through ctypes: provenance records the first, tests call the second.
extern "C" __attribute__((visibility("default"))) const char* stof_cpu_instruction_set() {
  return stof::cpu::instruction_set();
}
extern "C" __attribute__((visibility("default"))) bool stof_cpu_use_instruction_set(const char* name) {
  return stof::cpu::use_instruction_set(name);
}
