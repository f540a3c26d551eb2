// stof::sparse_attention on CUDA: checks its arguments, packs what the kernels cannot read in place, launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/cuda/problem.h"
#include "cuda_common.h"

namespace stof::bindings {
namespace {

using namespace stof::cuda;

constexpr const char* kOp = "sparse_attention";
constexpr int64_t kCell = 16;

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, int64_t q_len, int64_t kv_len) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "sparse_attention: q has dtype ",
                  torch::headeronly::toString(dtype), ", on CUDA it must be Half or BFloat16");
  STD_TORCH_CHECK(q.dim() == 4, "sparse_attention: q has shape ", shape(q), ", it must be (B, Hq, Lq, D)");
  const auto check_kv = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == q.get_device_index(), "sparse_attention: ", name,
                    " must be on q's device");
    STD_TORCH_CHECK(t.scalar_type() == dtype, "sparse_attention: ", name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), ", it must be q's, ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(3) == q.size(3), "sparse_attention: ", name,
                    " has shape ", shape(t), ", it must be (B, Hkv, Lk, D) with B and D of q ", shape(q));
  };
  check_kv("k", k);
  check_kv("v", v);
  STD_TORCH_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "sparse_attention: v has shape ", shape(v),
                  ", it must be that of k, ", shape(k));
  STD_TORCH_CHECK(q.size(1) == 0 || (k.size(1) > 0 && q.size(1) % k.size(1) == 0), "sparse_attention: q has ",
                  q.size(1), " heads, that must be a multiple of the ", k.size(1), " heads of k and v");
  const int64_t dim = q.size(3);
  STD_TORCH_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "sparse_attention: the head dim is ", dim,
                  ", it must be a multiple of 8 from 8 to 256");
  STD_TORCH_CHECK(q.size(2) == q_len, "sparse_attention: q has ", q.size(2), " queries, but the mask is for ", q_len);
  STD_TORCH_CHECK(k.size(2) == kv_len, "sparse_attention: k has ", k.size(2), " keys, but the mask is for ", kv_len);
  STD_TORCH_CHECK(std::max({q.size(0) * q.size(1), q_len, kv_len}) <= std::numeric_limits<int32_t>::max() / 2,
                  "sparse_attention: q ", shape(q), " and k ", shape(k), " exceed 2**30 along B * Hq, Lq or Lk");
}

void check_mask(const Tensor& q, std::initializer_list<std::pair<const char*, const Tensor*>> lists, int64_t mask_batch,
                int64_t mask_heads) {
  for (const auto& [name, list] : lists)
    STD_TORCH_CHECK(list->is_cuda() && list->get_device_index() == q.get_device_index(), "sparse_attention: ", name,
                    " must be on q's device");
  STD_TORCH_CHECK(mask_batch == 1 || mask_batch == q.size(0), "sparse_attention: mask_batch is ", mask_batch,
                  ", it must be 1 or the batch of q, ", q.size(0));
  STD_TORCH_CHECK(mask_heads == 1 || mask_heads == q.size(1), "sparse_attention: mask_heads is ", mask_heads,
                  ", it must be 1 or the heads of q, ", q.size(1));
}

// Whether the kernels can read the tensor where it lies: dense rows, 16-byte steps, 32-bit byte offsets inside a head.
bool readable(const Tensor& t) {
  if (t.numel() == 0) return true;
  if (t.stride(3) != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1 && t.stride(i) % 8 != 0) return false;
  }
  return t.size(2) * t.stride(2) <= std::numeric_limits<int32_t>::max();
}

Tensor packed(const Tensor& t) {
  if (readable(t)) return t;
  Tensor dense = torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  return torch::stable::copy_(dense, t);
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

BiasView bias_of(const Tensor& bias, const Tensor& q, int64_t kv_len) {
  const ScalarType dtype = bias.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == q.scalar_type(), "sparse_attention: bias has dtype ",
                  torch::headeronly::toString(dtype), ", it must be q's or Float");
  STD_TORCH_CHECK(bias.is_cuda() && bias.get_device_index() == q.get_device_index(),
                  "sparse_attention: bias must be on q's device");
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), kv_len};
  bool fits = bias.dim() == 4;
  for (int i = 0; fits && i < 4; ++i) fits = bias.size(i) == 1 || bias.size(i) == full[i];
  STD_TORCH_CHECK(fits, "sparse_attention: bias has shape ", shape(bias), ", it must be broadcastable to (", full[0],
                  ", ", full[1], ", ", full[2], ", ", full[3], ") and have 4 dimensions");
  const auto step = [&](int i) { return bias.size(i) == 1 ? 0 : bias.stride(i); };
  return {bias.data_ptr(), step(0), step(1), step(2), step(3), dtype == ScalarType::Float};
}

// A plan is [kernel, q_tile, kv_chunk, shape], then, if the layout's sizes are known, [items, parts, combines, key tiles of
// the longest item].
struct Plan {
  int64_t kernel = -1, shape = -1, items = -1, parts = -1, combines = -1, longest = 0;
};

Plan plan_of(const Tensor& plan, int64_t bits_width) {
  STD_TORCH_CHECK(plan.is_cpu() && plan.scalar_type() == ScalarType::Long && plan.dim() == 1 && plan.is_contiguous() &&
                      (plan.size(0) == 4 || plan.size(0) == 8),
                  "sparse_attention: plan has shape ", shape(plan), ", it must be 4 or 8 int64 on the CPU");
  const int64_t* word = data_of<const int64_t>(plan);
  Plan chosen;
  chosen.kernel = word[0] == -1 ? bits_width != kCell : word[0];
  STD_TORCH_CHECK(chosen.kernel == 0 || chosen.kernel == 1, "sparse_attention: plan[0] is ", word[0],
                  ", it must be 0 (row_wise), 1 (block_wise) or -1 (default)");
  STD_TORCH_CHECK((chosen.kernel == 0) == (bits_width == kCell), "sparse_attention: plan[0] is ", word[0],
                  ", but the lists are the layout of ", bits_width == kCell ? "row_wise" : "block_wise");
  chosen.shape = word[3] >= 1 ? word[3] - 1 : -1;
  STD_TORCH_CHECK(word[3] >= -1 && word[3] <= 4, "sparse_attention: plan[3] is ", word[3],
                  ", it must be 1 to 4 (a shape of block_wise), 0 or -1 (default)");
  if (plan.size(0) == 8) chosen.items = word[4], chosen.parts = word[5], chosen.combines = word[6], chosen.longest = word[7];
  return chosen;
}

Shape default_shape(const Problem& p, const BlockLayout& layout, int64_t longest, int multiprocessors) {
  const bool biased = p.bias.data != nullptr;
  if (layout.q_tile == 128) return Shape::kLarge;
  // Few blocks with long lists: more warps on each. At 4 key tiles and less the groups do not pay for their merge.
  const int64_t blocks = int64_t{layout.item_limit} * layout.copies;
  if (layout.exact && 2 * blocks <= 3 * multiprocessors && longest > 4 && has_shape(Shape::kSplit, p.head_dim, biased)) return Shape::kSplit;
  return Shape::kWide;
}

void run_block_wise(const Problem& p, const Tensor& q, const Tensor& ptr, const Tensor& col, const Tensor& slot,
                    const Tensor& bits, const Plan& plan, cudaStream_t stream) {
  check_list("col", col, ScalarType::Int, {-1, 4});
  check_list("slot", slot, ScalarType::Int, {-1, kItemInts});
  check_list("ptr", ptr, ScalarType::Int, {-1});
  check_list("bits", bits, ScalarType::Int, {-1, -1});
  STD_TORCH_CHECK(ptr.size(0) >= kHeaderInts && ptr.size(0) % kCombineInts == 0, "sparse_attention: ptr has shape ",
                  shape(ptr), ", it must hold a header of 8 and entries of 4");
  BlockLayout layout{};
  layout.q_tile = static_cast<int>(bits.size(1) / 2);
  STD_TORCH_CHECK(bits.size(1) == 128 || bits.size(1) == 256, "sparse_attention: bits has shape ", shape(bits),
                  ", a row must have 128 or 256 words (query tiles of 64 or 128)");
  layout.header = data_of<const int>(ptr);
  layout.combines = layout.header + kHeaderInts;
  layout.items = data_of<const int>(slot);
  layout.col = data_of<const int>(col);
  layout.bits = data_of<const uint32_t>(bits);
  layout.q_tiles = static_cast<int>(ceil_div(p.q_len, layout.q_tile));
  const int64_t planes = int64_t{p.mask_batch} * p.mask_heads, tiles = planes * layout.q_tiles;
  layout.copies = static_cast<int>(int64_t{p.batch} * p.q_heads / planes);
  layout.exact = plan.items >= 0 && plan.parts >= 0 && plan.combines >= 0;
  const int64_t spare = slot.size(0) - tiles, combine_room = (ptr.size(0) - kHeaderInts) / kCombineInts;
  STD_TORCH_CHECK(spare >= 0 && plan.items <= slot.size(0) && plan.combines <= combine_room,
                  "sparse_attention: slot has room for ", slot.size(0), " items and ptr for ", combine_room,
                  " entries, too few for this mask");
  layout.item_limit = static_cast<int>(layout.exact ? plan.items : slot.size(0));
  layout.combine_limit = static_cast<int>(layout.exact ? plan.combines : std::min(spare, combine_room));
  STD_TORCH_CHECK(int64_t{layout.item_limit} * layout.copies <= std::numeric_limits<int32_t>::max(),
                  "sparse_attention: ", layout.item_limit, " work items times ", layout.copies, " heads exceed 2**31 - 1");
  const int64_t kv_bytes = std::max<int64_t>(1, 4 * int64_t{p.kv_len} * p.head_dim);
  const DeviceNumbers numbers = numbers_of(q.get_device_index());
  const int64_t group = std::clamp<int64_t>(numbers.l2_bytes / 2 / kv_bytes, 1, layout.copies);
  const int64_t last = layout.copies - (layout.copies - 1) / group * group;
  layout.group_blocks = FastDivisor(static_cast<uint32_t>(std::max<int64_t>(1, layout.item_limit * group)));
  layout.group_copies = FastDivisor(static_cast<uint32_t>(group)), layout.last_copies = FastDivisor(static_cast<uint32_t>(last));

  const int64_t parts = layout.exact ? plan.parts : 2 * spare;
  const int64_t part_rows = layout.combine_limit > 0 ? parts * layout.copies * layout.q_tile : 0;
  std::optional<Tensor> workspace;
  if (part_rows > 0) {
    const int64_t width = p.head_dim + 2;  // sums, then maximum and sum of each row
    workspace = new_strided(q, {part_rows * width}, {1}, aoti_torch_dtype_float32());
    layout.part_out = data_of<float>(*workspace);
    layout.part_stat = reinterpret_cast<float2*>(layout.part_out + part_rows * p.head_dim);
  }

  Shape chosen = plan.shape >= 0 ? static_cast<Shape>(plan.shape)
                                 : default_shape(p, layout, plan.longest, numbers.multiprocessors);
  if (!has_shape(chosen, p.head_dim, p.bias.data != nullptr))
    chosen = layout.q_tile == 128 ? Shape::kLarge : Shape::kWide;
  STD_TORCH_CHECK((chosen == Shape::kLarge) == (layout.q_tile == 128) &&
                      has_shape(chosen, p.head_dim, p.bias.data != nullptr),
                  "sparse_attention: no block_wise kernel for query tile ", layout.q_tile, ", head dim ", p.head_dim,
                  " and plan[3] = ", plan.shape + 1);
  check_launch(kOp, launch_block_wise(p, layout, chosen, stream));
  if (layout.combine_limit > 0) check_launch(kOp, launch_combine(p, layout, stream));
}

void run_row_wise(const Problem& p, const Tensor& ptr, const Tensor& col, const Tensor& slot, const Tensor& bits,
                  cudaStream_t stream) {
  const int64_t strips = ceil_div(p.q_len, kCell);
  check_list("ptr", ptr, ScalarType::Int, {int64_t{p.mask_batch} * p.mask_heads * strips + 1});
  check_list("col", col, ScalarType::Int, {-1});
  check_list("slot", slot, ScalarType::Int, {col.size(0)});
  check_list("bits", bits, ScalarType::Short, {-1, kCell});
  const CellLists lists{data_of<const int>(ptr), data_of<const int>(col), data_of<const int>(slot),
                        data_of<const uint16_t>(bits), static_cast<int>(strips)};
  check_launch(kOp, launch_row_wise(p, lists, stream));
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, Tensor ptr,
                                            Tensor col, Tensor slot, Tensor bits, Tensor counts, Tensor plan,
                                            int64_t q_len, int64_t kv_len, int64_t mask_batch, int64_t mask_heads,
                                            double scale, bool return_lse) {
  check_inputs(q, k, v, q_len, kv_len);
  check_list("counts", counts, ScalarType::Long, {4});
  check_mask(q, {{"ptr", &ptr}, {"col", &col}, {"slot", &slot}, {"bits", &bits}, {"counts", &counts}}, mask_batch,
             mask_heads);
  STD_TORCH_CHECK(bits.dim() == 2, "sparse_attention: bits has shape ", shape(bits), ", it must have 2 dimensions");
  const Plan chosen = plan_of(plan, bits.size(1));
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());

  Problem p{};
  p.batch = static_cast<int>(q.size(0)), p.q_heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1)), p.head_dim = static_cast<int>(q.size(3));
  p.q_len = static_cast<int>(q_len), p.kv_len = static_cast<int>(kv_len);
  p.mask_batch = static_cast<int>(mask_batch), p.mask_heads = static_cast<int>(mask_heads);
  p.heads = FastDivisor(std::max(1, p.q_heads)), p.planes = FastDivisor(std::max(1, p.mask_heads));
  p.shared = FastDivisor(std::max(1, p.q_heads / std::max(1, p.kv_heads)));
  p.is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  // A scale of 0 stays exact: a score times 1e-30 is below what the softmax can see.
  p.scale_log2 = std::max(std::fabs(static_cast<float>(scale)) * 1.44269504088896340736f, 1e-30f);
  p.q_flip = scale < 0 ? 0x80008000u : 0u;
  if (bias.has_value()) p.bias = bias_of(*bias, q, kv_len);

  const int64_t heads = p.q_heads, dim = p.head_dim;
  const Tensor out = new_strided(q, {p.batch, heads, q_len, dim}, {q_len * heads * dim, dim, heads * dim, 1},
                                 p.is_bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16());
  const Tensor lse = return_lse ? new_strided(q, {p.batch, heads, q_len}, {heads * q_len, q_len, 1}, aoti_torch_dtype_float32())
                                : new_strided(q, {0}, {1}, aoti_torch_dtype_float32());
  const std::tuple<Tensor, Tensor> results{out, lse};
  if (out.numel() == 0) return results;
  q = packed(q), k = packed(k), v = packed(v);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.out = out.data_ptr();
  p.lse = return_lse ? data_of<float>(lse) : nullptr;
  p.q_stride = strides_of(q), p.k_stride = strides_of(k), p.v_stride = strides_of(v);
  p.out_stride = strides_of(out);
  p.counts = data_of<const int64_t>(counts);
  const cudaStream_t stream = current_stream(q);
  if (chosen.kernel == 1) run_block_wise(p, q, ptr, col, slot, bits, chosen, stream);
  else run_row_wise(p, ptr, col, slot, bits, stream);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stof, CUDA, m) { m.impl("sparse_attention", TORCH_BOX(&sparse_attention)); }

}  // namespace stof::bindings
