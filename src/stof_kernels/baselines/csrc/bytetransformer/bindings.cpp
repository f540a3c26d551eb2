// The operators torch.ops.stof_bytetransformer.*: check arguments, allocate results, launch.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "common/host.h"
#include "launch.h"

namespace stof::bytetransformer {
namespace {

using namespace stof::baselines;

bool is_float(const char* op, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STOF_EXPECT(dtype == ScalarType::Half || dtype == ScalarType::Float, op, ": dtype is ", torch::headeronly::toString(dtype),
             ", it must be Half or Float");
  return dtype == ScalarType::Float;
}

struct Sizes {
  int64_t batch, seq_len, heads, head_dim;
  int64_t width() const { return heads * head_dim; }
};

// Of packed qkv (batch, seq_len, 3 * heads * head_dim).
Sizes sizes_of(const char* op, const Tensor& qkv, int64_t heads) {
  STOF_EXPECT(qkv.is_cuda() && qkv.dim() == 3 && heads >= 1 && qkv.size(2) % (6 * heads) == 0 && qkv.numel() > 0, op, ": qkv has shape ",
             shape(qkv), ", it must be (batch, seq_len, 3 * ", heads, " heads * an even head_dim) on a GPU and not empty");
  STOF_EXPECT(qkv.size(0) <= 65535, op, ": the batch is ", qkv.size(0), ", it must be at most 65535");
  return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads)};
}

const half_t* halves(const Tensor& t) { return static_cast<const half_t*>(t.data_ptr()); }

void check_packed(const char* op, const Tensor& qkv, const Tensor& bias, ScalarType dtype, const Sizes& n) {
  check(op, "qkv", qkv, qkv, dtype, {n.batch, n.seq_len, 3 * n.width()});
  check(op, "bias", bias, qkv, dtype, {3 * n.width()});
}

void check_split(const char* op, const Sizes& n) {
  STOF_EXPECT(n.width() / 2 <= 1024, op, ": heads * head_dim is ", n.width(), ", it must be at most 2048 (a thread per pair)");
}

Tensor short_attention(Tensor qkv, Tensor bias, Tensor mask, int64_t heads, double scale) {
  constexpr const char* op = "short_attention";
  const Sizes n = sizes_of(op, qkv, heads);
  check_packed(op, qkv, bias, ScalarType::Half, n);
  check(op, "mask", mask, qkv, ScalarType::Half, {n.batch, n.seq_len, n.seq_len});
  const int seq_len = static_cast<int>(n.seq_len), head_dim = static_cast<int>(n.head_dim);
  STOF_EXPECT(n.seq_len <= 352 && (fits_whole(seq_len, head_dim) || fits_slabs(seq_len, head_dim)), op, ": seq_len is ", n.seq_len,
             " with head_dim ", n.head_dim, ", it must be at most 352 with 64 or at most 48 with 16");
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Tensor out = empty(qkv, {n.batch, n.seq_len, n.width()});
  const ShortProblem p{halves(qkv), halves(bias), halves(mask), data_of<half_t>(out), static_cast<int>(n.batch), seq_len,
                       static_cast<int>(heads), head_dim, static_cast<float>(scale)};
  const cudaStream_t stream = current_stream(qkv);
  check_launch(op, fits_whole(seq_len, head_dim) ? launch_whole(p, stream) : launch_slabs(p, stream));
  return out;
}

void split_heads(Tensor qkv, Tensor bias, int64_t heads, Tensor split) {
  constexpr const char* op = "split_heads";
  const Sizes n = sizes_of(op, qkv, heads);
  const bool wide = is_float(op, qkv);
  check_packed(op, qkv, bias, qkv.scalar_type(), n);
  check_split(op, n);
  check(op, "split", split, qkv, qkv.scalar_type(), {3, heads, n.batch, n.seq_len, n.head_dim});
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  check_launch(op, launch_split(qkv.data_ptr(), bias.data_ptr(), split.data_ptr(), static_cast<int>(n.batch), static_cast<int>(n.seq_len),
                                static_cast<int>(heads), static_cast<int>(n.head_dim), wide, current_stream(qkv)));
}

Tensor long_attention(Tensor qkv, Tensor bias, Tensor mask, Tensor lengths, int64_t heads, double scale, Tensor split, Tensor scores,
                      Tensor partials, Tensor stats) {
  constexpr const char* op = "long_attention";
  const Sizes n = sizes_of(op, qkv, heads);
  STOF_EXPECT(n.seq_len <= kLongLast && fits_long(static_cast<int>(n.seq_len), static_cast<int>(n.head_dim)), op, ": seq_len is ", n.seq_len,
             " with head_dim ", n.head_dim, ", it must be a multiple of 8 from 392 to 1024 with 64");
  check(op, "mask", mask, qkv, ScalarType::Half, {n.batch, n.seq_len, n.seq_len});
  check(op, "lengths", lengths, qkv, ScalarType::Int, {n.batch});
  check(op, "scores", scores, qkv, ScalarType::Half, {n.batch, heads, n.seq_len, n.seq_len});
  check(op, "partials", partials, qkv, ScalarType::Float, {n.batch, heads, ceil_div(static_cast<int>(n.seq_len), kScoreTile), n.seq_len, 2});
  check(op, "stats", stats, qkv, ScalarType::Float, {n.batch, heads, n.seq_len, 2});
  STOF_EXPECT(n.batch * heads <= 65535, op, ": batch * heads is ", n.batch * heads, ", it must be at most 65535");
  split_heads(qkv, bias, heads, split);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const Tensor out = empty(qkv, {n.batch, n.seq_len, n.width()});
  const LongProblem p{halves(split), halves(mask), data_of<const int>(lengths), data_of<half_t>(scores), data_of<float>(partials),
                      data_of<float>(stats), data_of<half_t>(out), static_cast<int>(n.batch), static_cast<int>(n.seq_len),
                      static_cast<int>(heads), static_cast<float>(scale)};
  check_launch(op, launch_grouped(p, multiprocessors_of(qkv.get_device_index()), current_stream(qkv)));
  return out;
}

void masked_softmax_(Tensor scores, Tensor mask) {
  constexpr const char* op = "masked_softmax_";
  const bool wide = is_float(op, scores);
  STOF_EXPECT(scores.is_cuda() && scores.dim() == 4 && scores.numel() > 0, op, ": scores has shape ", shape(scores),
             ", it must be (heads, batch, seq_len, seq_len) on a GPU and not empty");
  const int64_t heads = scores.size(0), batch = scores.size(1), seq_len = scores.size(2);
  check(op, "scores", scores, scores, scores.scalar_type(), {heads, batch, seq_len, seq_len});
  check(op, "mask", mask, scores, scores.scalar_type(), {batch, seq_len, seq_len});
  STOF_EXPECT(seq_len <= kMaxSoftmaxBytes && heads <= kMaxHeads && fits_unfused(static_cast<int>(seq_len), static_cast<int>(heads)), op, ": ",
             heads, " heads x ", seq_len, " keys, it must be at most 32 heads, and heads * keys * 4 at most 65536 bytes above 1024 keys");
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  check_launch(op, launch_softmax(scores.data_ptr(), mask.data_ptr(), static_cast<int>(batch), static_cast<int>(seq_len),
                                  static_cast<int>(heads), wide, current_stream(scores)));
}

Tensor merge_heads(Tensor context) {
  constexpr const char* op = "merge_heads";
  const bool wide = is_float(op, context);
  STOF_EXPECT(context.is_cuda() && context.dim() == 4 && context.numel() > 0 && context.size(3) % 2 == 0, op, ": context has shape ",
             shape(context), ", it must be (heads, batch, seq_len, an even head_dim) on a GPU and not empty");
  const Sizes n{context.size(1), context.size(2), context.size(0), context.size(3)};
  check(op, "context", context, context, context.scalar_type(), {n.heads, n.batch, n.seq_len, n.head_dim});
  check_split(op, n);
  const torch::stable::accelerator::DeviceGuard guard(context.get_device_index());
  const Tensor out = empty(context, {n.batch, n.seq_len, n.width()});
  check_launch(op, launch_merge(context.data_ptr(), out.data_ptr(), static_cast<int>(n.batch), static_cast<int>(n.seq_len),
                                static_cast<int>(n.heads), static_cast<int>(n.head_dim), wide, current_stream(context)));
  return out;
}

Tensor bias_residual_norm(Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor beta, double epsilon) {
  constexpr const char* op = "bias_residual_norm";
  const bool wide = is_float(op, x);
  STOF_EXPECT(x.is_cuda() && x.dim() == 2 && x.numel() > 0, op, ": x has shape ", shape(x),
             ", it must be (tokens, columns) on a GPU and not empty");
  const int64_t rows = x.size(0), columns = x.size(1);
  STOF_EXPECT(columns <= 4096 && norm_threads(static_cast<int>(columns)) > 0, op, ": x has ", columns,
             " columns, it must be a multiple of 64 up to 1024 or of 128 up to 4096");
  check(op, "x", x, x, x.scalar_type(), {rows, columns});
  check(op, "residual", residual, x, x.scalar_type(), {rows, columns});
  for (const auto& [name, vector] : {std::pair{"bias", &bias}, std::pair{"gamma", &gamma}, std::pair{"beta", &beta}})
    check(op, name, *vector, x, x.scalar_type(), {columns});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = empty(x, {rows, columns});
  check_launch(op, launch_norm(x.data_ptr(), bias.data_ptr(), residual.data_ptr(), gamma.data_ptr(), beta.data_ptr(), out.data_ptr(),
                               static_cast<int>(rows), static_cast<int>(columns), static_cast<float>(epsilon), wide, current_stream(x)));
  return out;
}

void bias_gelu_(Tensor x, Tensor bias) {
  constexpr const char* op = "bias_gelu_";
  const bool wide = is_float(op, x);
  STOF_EXPECT(x.is_cuda() && x.dim() == 2 && x.numel() > 0 && x.size(1) % 2 == 0, op, ": x has shape ", shape(x),
             ", it must be (tokens, an even number of columns) on a GPU and not empty");
  check(op, "x", x, x, x.scalar_type(), {x.size(0), x.size(1)});
  check(op, "bias", bias, x, x.scalar_type(), {x.size(1)});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(op, launch_gelu(x.data_ptr(), bias.data_ptr(), x.size(0), static_cast<int>(x.size(1)), wide, current_stream(x)));
}

}  // namespace

STABLE_TORCH_LIBRARY(stof_bytetransformer, m) {
  m.def("short_attention(Tensor qkv, Tensor bias, Tensor mask, int heads, float scale) -> Tensor");
  m.def(
      "long_attention(Tensor qkv, Tensor bias, Tensor mask, Tensor lengths, int heads, float scale, Tensor(a!) split, "
      "Tensor(b!) scores, Tensor(c!) partials, Tensor(d!) stats) -> Tensor");
  m.def("split_heads(Tensor qkv, Tensor bias, int heads, Tensor(a!) split) -> ()");
  m.def("masked_softmax_(Tensor(a!) scores, Tensor mask) -> ()");
  m.def("merge_heads(Tensor context) -> Tensor");
  m.def("bias_residual_norm(Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor beta, float epsilon) -> Tensor");
  m.def("bias_gelu_(Tensor(a!) x, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stof_bytetransformer, CUDA, m) {
  m.impl("short_attention", TORCH_BOX(&short_attention));
  m.impl("long_attention", TORCH_BOX(&long_attention));
  m.impl("split_heads", TORCH_BOX(&split_heads));
  m.impl("masked_softmax_", TORCH_BOX(&masked_softmax_));
  m.impl("merge_heads", TORCH_BOX(&merge_heads));
  m.impl("bias_residual_norm", TORCH_BOX(&bias_residual_norm));
  m.impl("bias_gelu_", TORCH_BOX(&bias_gelu_));
}

}  // namespace stof::bytetransformer
