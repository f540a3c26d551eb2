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
  const auto size = t.sizes(), stride = t.strides();
  if (size[0] * size[1] * size[2] * size[3] == 0) return true;
  if (stride[3] != 1 || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && stride[i] % 8 != 0) return false;
  }
  return size[2] * stride[2] <= std::numeric_limits<int32_t>::max();
}

Tensor packed(const Tensor& t) {
  if (readable(t)) return t;
  Tensor dense = torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  return torch::stable::copy_(dense, t);
}

Strides strides_of(const Tensor& t) {
  const auto stride = t.strides();
  return {stride[0], stride[1], stride[2]};
}

BiasView bias_of(const Tensor& bias, const Tensor& q, int64_t kv_len) {
  const ScalarType dtype = bias.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == q.scalar_type(), "sparse_attention: bias has dtype ",
                  torch::headeronly::toString(dtype), ", it must be q's or Float");
  STD_TORCH_CHECK(bias.is_cuda() && bias.get_device_index() == q.get_device_index(),
                  "sparse_attention: bias must be on q's device");
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), kv_len};
  int64_t stride[4];
  STD_TORCH_CHECK(broadcast_strides(bias, full, stride), "sparse_attention: bias has shape ", shape(bias),
                  ", it must be broadcastable to (", full[0], ", ", full[1], ", ", full[2], ", ", full[3], ")");
  return {bias.data_ptr(), stride[0], stride[1], stride[2], stride[3], dtype == ScalarType::Float};
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
  STD_TORCH_CHECK(word[3] >= -1 && word[3] <= kShapes, "sparse_attention: plan[3] is ", word[3],
                  ", it must be 1 to ", kShapes, " (a shape of block_wise), 0 or -1 (default)");
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

// A call that was checked, but for its tensors.
struct Call {
  int64_t magic = kPacked, captured = 0;
  Problem problem;     // without q, k, v, bias, scale and results
  BlockLayout layout;  // of block_wise, without its workspace
  CellLists lists;     // of row_wise
  Plan plan;
  int64_t part_rows;  // rows of partial results that the layout may write
  int64_t q_size[4], k_size[4];
  double default_scale;
  int32_t device, multiprocessors;
  ScalarType dtype;
};

// The block-wise layout in the buffers, and how many rows of partial results it may write.
void set_block_layout(Call& call, const Tensor& ptr, const Tensor& col, const Tensor& slot, const Tensor& bits) {
  check_list("col", col, ScalarType::Int, {-1, 4});
  check_list("slot", slot, ScalarType::Int, {-1, kItemInts});
  check_list("ptr", ptr, ScalarType::Int, {-1});
  check_list("bits", bits, ScalarType::Int, {-1, -1});
  STD_TORCH_CHECK(ptr.size(0) >= kHeaderInts && ptr.size(0) % kCombineInts == 0, "sparse_attention: ptr has shape ",
                  shape(ptr), ", it must hold a header of 8 and entries of 4");
  const Problem& p = call.problem;
  const Plan& plan = call.plan;
  BlockLayout& layout = call.layout;
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
  const DeviceNumbers numbers = numbers_of(call.device);
  call.multiprocessors = numbers.multiprocessors;
  const int64_t group = std::clamp<int64_t>(numbers.l2_bytes / 2 / kv_bytes, 1, std::max(1, layout.copies));
  const int64_t last = layout.copies - (layout.copies - 1) / group * group;
  layout.group_blocks = FastDivisor(static_cast<uint32_t>(std::max<int64_t>(1, layout.item_limit * group)));
  layout.group_copies = FastDivisor(static_cast<uint32_t>(group)), layout.last_copies = FastDivisor(static_cast<uint32_t>(last));
  const int64_t parts = layout.exact ? plan.parts : 2 * spare;
  call.part_rows = layout.combine_limit > 0 ? parts * layout.copies * layout.q_tile : 0;
}

void set_cell_lists(Call& call, const Tensor& ptr, const Tensor& col, const Tensor& slot, const Tensor& bits) {
  const Problem& p = call.problem;
  const int64_t strips = ceil_div(p.q_len, kCell);
  check_list("ptr", ptr, ScalarType::Int, {int64_t{p.mask_batch} * p.mask_heads * strips + 1});
  check_list("col", col, ScalarType::Int, {-1});
  check_list("slot", slot, ScalarType::Int, {col.size(0)});
  check_list("bits", bits, ScalarType::Short, {-1, kCell});
  call.lists = {data_of<const int>(ptr), data_of<const int>(col), data_of<const int>(slot), data_of<const uint16_t>(bits),
                static_cast<int>(strips)};
}

Call checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ptr, const Tensor& col, const Tensor& slot,
             const Tensor& bits, const Tensor& counts, const Tensor& plan, int64_t q_len, int64_t kv_len,
             int64_t mask_batch, int64_t mask_heads) {
  check_inputs(q, k, v, q_len, kv_len);
  check_list("counts", counts, ScalarType::Long, {4});
  check_mask(q, {{"ptr", &ptr}, {"col", &col}, {"slot", &slot}, {"bits", &bits}, {"counts", &counts}}, mask_batch,
             mask_heads);
  STD_TORCH_CHECK(bits.dim() == 2, "sparse_attention: bits has shape ", shape(bits), ", it must have 2 dimensions");
  Call call{};
  call.plan = plan_of(plan, bits.size(1));
  call.device = q.get_device_index(), call.dtype = q.scalar_type();
  for (int i = 0; i < 4; ++i) call.q_size[i] = q.size(i), call.k_size[i] = k.size(i);
  Problem& p = call.problem;
  p.batch = static_cast<int>(q.size(0)), p.q_heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1)), p.head_dim = static_cast<int>(q.size(3));
  p.q_len = static_cast<int>(q_len), p.kv_len = static_cast<int>(kv_len);
  p.mask_batch = static_cast<int>(mask_batch), p.mask_heads = static_cast<int>(mask_heads);
  p.heads = FastDivisor(std::max(1, p.q_heads)), p.planes = FastDivisor(std::max(1, p.mask_heads));
  p.shared = FastDivisor(std::max(1, p.q_heads / std::max(1, p.kv_heads)));
  call.default_scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  p.is_bf16 = call.dtype == ScalarType::BFloat16;
  p.counts = data_of<const int64_t>(counts);
  if (call.plan.kernel == 1) set_block_layout(call, ptr, col, slot, bits);
  else set_cell_lists(call, ptr, col, slot, bits);
  return call;
}

void run_block_wise(const Call& call, const Problem& p, cudaStream_t stream) {
  BlockLayout layout = call.layout;
  const int64_t wanted = call.plan.shape;
  Shape chosen = wanted >= 0 ? static_cast<Shape>(wanted)
                             : default_shape(p, layout, call.plan.longest, call.multiprocessors);
  const bool biased = p.bias.data != nullptr;
  if (!has_shape(chosen, p.head_dim, biased)) chosen = layout.q_tile == 128 ? Shape::kLarge : Shape::kWide;
  STD_TORCH_CHECK(query_tile(chosen) == layout.q_tile && has_shape(chosen, p.head_dim, biased),
                  "sparse_attention: no block_wise kernel for query tile ", layout.q_tile, ", head dim ", p.head_dim,
                  " and plan[3] = ", wanted + 1);
  // Blocks that stay count the items they take, unless there are only a few for each.
  const int64_t dealt = int64_t{most_dealt(chosen, p.head_dim)} * call.multiprocessors;
  const bool counts = stays(chosen) && int64_t{layout.item_limit} * layout.copies > dealt;
  const int64_t width = p.head_dim + 2;  // of a partial row: sums, then maximum and sum
  std::optional<Tensor> workspace;
  if (call.part_rows > 0 || counts) {
    workspace = new_on_cuda(call.device, {call.part_rows * width + 1}, {1}, aoti_torch_dtype_float32());
    layout.part_out = data_of<float>(*workspace);
    layout.part_stat = reinterpret_cast<float2*>(layout.part_out + call.part_rows * p.head_dim);
    layout.next_unit = counts ? reinterpret_cast<int*>(layout.part_out + call.part_rows * width) : nullptr;
  }
  check_launch(kOp, launch_block_wise(p, layout, chosen, stream));
  if (layout.combine_limit > 0) check_launch(kOp, launch_combine(p, layout, stream));
}

// Remembers that a graph holds the sizes of this call: the mask must not change them under it.
void note_capture(Call& call, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // An error means that another thread captures: not this stream.
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) cudaGetLastError();
  if (status != cudaStreamCaptureStatusNone) call.captured = 1;
}

struct Results {
  Tensor out;
  std::optional<Tensor> lse;
};

Results run(Call& call, Tensor q, Tensor k, Tensor v, const std::optional<Tensor>& bias, double scale, bool return_lse) {
  int current = -1;
  check_launch(kOp, cudaGetDevice(&current));
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (current != call.device) guard.emplace(call.device);
  Problem p = call.problem;
  // A scale of 0 stays exact: a score times 1e-30 is below what the softmax can see.
  p.scale_log2 = std::max(std::fabs(static_cast<float>(scale)) * 1.44269504088896340736f, 1e-30f);
  p.q_flip = scale < 0 ? 0x80008000u : 0u;
  if (bias.has_value()) p.bias = bias_of(*bias, q, p.kv_len);

  const int64_t batch = p.batch, heads = p.q_heads, rows = p.q_len, dim = p.head_dim;
  Results results{new_on_cuda(call.device, {batch, heads, rows, dim}, {rows * heads * dim, dim, heads * dim, 1},
                              p.is_bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16()),
                  std::nullopt};
  if (return_lse)
    results.lse = new_on_cuda(call.device, {batch, heads, rows}, {heads * rows, rows, 1}, aoti_torch_dtype_float32());
  if (batch * heads * rows * dim == 0) return results;
  q = packed(q), k = packed(k), v = packed(v);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.out = results.out.data_ptr();
  p.lse = return_lse ? data_of<float>(*results.lse) : nullptr;
  p.q_stride = strides_of(q), p.k_stride = strides_of(k), p.v_stride = strides_of(v);
  p.out_stride = {rows * heads * dim, dim, heads * dim};
  const cudaStream_t stream = current_stream(call.device);
  if (call.plan.kernel == 0 || call.layout.exact) note_capture(call, stream);
  if (call.plan.kernel == 1) run_block_wise(call, p, stream);
  else check_launch(kOp, launch_row_wise(p, call.lists, stream));
  return results;
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias, Tensor ptr,
                                            Tensor col, Tensor slot, Tensor bits, Tensor counts, Tensor plan,
                                            int64_t q_len, int64_t kv_len, int64_t mask_batch, int64_t mask_heads,
                                            double scale, bool return_lse) {
  Call call = checked(q, k, v, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads);
  Results results = run(call, q, k, v, bias, scale, return_lse);
  if (!return_lse) results.lse = new_on_cuda(call.device, {0}, {1}, aoti_torch_dtype_float32());
  return {results.out, *results.lse};
}

Tensor pack_call(Tensor q, Tensor k, Tensor v, Tensor ptr, Tensor col, Tensor slot, Tensor bits, Tensor counts, Tensor plan,
                 int64_t q_len, int64_t kv_len, int64_t mask_batch, int64_t mask_heads) {
  const Call call = checked(q, k, v, ptr, col, slot, bits, counts, plan, q_len, kv_len, mask_batch, mask_heads);
  return pack(call, {ptr, col, slot, bits, counts});
}

Results repeat(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& packed, const std::optional<Tensor>& bias,
               std::optional<double> scale, bool return_lse) {
  Call& call = unpack<Call>(packed);
  STOF_CHECK(is_like(q, call.dtype, call.device, call.q_size) && is_like(k, call.dtype, call.device, call.k_size) &&
                 is_like(v, call.dtype, call.device, call.k_size),
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

STABLE_TORCH_LIBRARY_IMPL(stof, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("pack_call", TORCH_BOX(&pack_call));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_lse", TORCH_BOX(&attend_lse));
}

}  // namespace stof::bindings
