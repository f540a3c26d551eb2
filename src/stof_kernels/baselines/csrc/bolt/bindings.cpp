// The operators torch.ops.stof_bolt.*: check arguments, allocate results, launch.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/host.h"
#include "launch.h"

namespace stof::bolt {
namespace {

using namespace stof::baselines;

using Launch = cudaError_t (*)(const GemmProblem&, cudaStream_t);
#define STOF_ENTRY(...) &launch_gemm<Tile<__VA_ARGS__>>,
constexpr Launch kCandidates[] = {STOF_BOLT_ALL(STOF_ENTRY)};
#undef STOF_ENTRY
constexpr int64_t kCount = sizeof(kCandidates) / sizeof(kCandidates[0]);

struct Persistent {
  int n0, n1;
  cudaError_t (*launch)(const PersistentProblem&, cudaStream_t);
};
#define STOF_REGISTERS(n0, n1) {n0, n1, &launch_registers<n0, n1>},
#define STOF_SHARED(n0, n1) {n0, n1, &launch_shared<n0, n1>},
constexpr Persistent kPersistent[] = {STOF_BOLT_REGISTERS(STOF_REGISTERS) STOF_BOLT_SHARED(STOF_SHARED)};
constexpr int64_t kPersistentCount = sizeof(kPersistent) / sizeof(kPersistent[0]);

constexpr int64_t kMost = int64_t{1} << 30;  // of a size, so that indices of rows and columns fit an int

const half_t* halves(const Tensor& t) { return static_cast<const half_t*>(t.data_ptr()); }

// The bias of an epilogue, or null where it has none.
const half_t* bias_of(const char* op, const char* name, const std::optional<Tensor>& bias, int64_t epilogue, int64_t n, const Tensor& like) {
  STOF_EXPECT(epilogue >= kLinear && epilogue <= kBiasGelu, op, ": the epilogue is ", epilogue, ", it must be from 0 to ", int(kBiasGelu));
  STOF_EXPECT(bias.has_value() == (epilogue != kLinear), op, ": ", name, " must be given for every epilogue but 0, and for that not");
  if (!bias.has_value()) return nullptr;
  check(op, name, *bias, like, ScalarType::Half, {n});
  return halves(*bias);
}

Tensor gemm(Tensor a, Tensor b, std::optional<Tensor> bias, int64_t epilogue, int64_t candidate) {
  constexpr const char* op = "gemm";
  const int64_t dim = a.dim();
  STOF_EXPECT(a.is_cuda() && (dim == 2 || dim == 3) && a.numel() > 0 && b.dim() == dim && b.numel() > 0, op, ": a has shape ", shape(a),
             " and b ", shape(b), ", they must be (m, k) and (n, k), or with a batch before, on a GPU and not empty");
  const int64_t batch = dim == 3 ? a.size(0) : 1, m = a.size(dim - 2), k = a.size(dim - 1), n = b.size(dim - 2);
  std::vector<int64_t> left{m, k}, right{n, k}, result{m, n};
  if (dim == 3)
    for (auto* size : {&left, &right, &result}) size->insert(size->begin(), batch);
  check(op, "a", a, a, ScalarType::Half, left);
  check(op, "b", b, a, ScalarType::Half, right);
  STOF_EXPECT(n % 8 == 0 && k % 8 == 0, op, ": n is ", n, " and k ", k, ", both must be multiples of 8");
  STOF_EXPECT(batch <= 65535 && m < kMost && n < kMost && k < kMost && n / 64 / 8 <= 65535, op, ": the batch is ", batch, " of ", m, " x ", n,
             " x ", k, ", it must be at most 65535, and sizes below 2^30");
  STOF_EXPECT(candidate >= 0 && candidate < kCount, op, ": the candidate is ", candidate, ", it must be from 0 to ", kCount - 1);
  const half_t* add = bias_of(op, "bias", bias, epilogue, n, a);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const Tensor out = empty(a, result);
  const GemmProblem p{halves(a), halves(b), add, data_of<half_t>(out), static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
                      static_cast<int>(batch), static_cast<int>(epilogue)};
  check_launch(op, kCandidates[candidate](p, current_stream(a)));
  return out;
}

Tensor persistent(Tensor a, Tensor b0, std::optional<Tensor> bias0, int64_t epilogue0, Tensor b1, std::optional<Tensor> bias1,
                  int64_t epilogue1, int64_t kernel) {
  constexpr const char* op = "persistent";
  STOF_EXPECT(kernel >= 0 && kernel < kPersistentCount, op, ": the kernel is ", kernel, ", it must be from 0 to ", kPersistentCount - 1);
  const Persistent& chosen = kPersistent[kernel];
  STOF_EXPECT(a.is_cuda() && a.dim() == 2 && a.numel() > 0, op, ": a has shape ", shape(a), ", it must be (m, k) on a GPU and not empty");
  const int64_t m = a.size(0), k = a.size(1);
  STOF_EXPECT(k % 8 == 0 && k < kMost && m < kMost, op, ": a has shape ", shape(a), ", k must be a multiple of 8, sizes below 2^30");
  check(op, "a", a, a, ScalarType::Half, {m, k});
  check(op, "b0", b0, a, ScalarType::Half, {chosen.n0, k});
  check(op, "b1", b1, a, ScalarType::Half, {chosen.n1, chosen.n0});
  const half_t* add0 = bias_of(op, "bias0", bias0, epilogue0, chosen.n0, a);
  const half_t* add1 = bias_of(op, "bias1", bias1, epilogue1, chosen.n1, a);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const Tensor out = empty(a, {m, chosen.n1});
  const PersistentProblem p{halves(a), halves(b0), add0, halves(b1), add1, data_of<half_t>(out), static_cast<int>(m), static_cast<int>(k),
                            static_cast<int>(epilogue0), static_cast<int>(epilogue1)};
  check_launch(op, chosen.launch(p, current_stream(a)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(stof_bolt, m) {
  m.def("gemm(Tensor a, Tensor b, Tensor? bias, int epilogue, int candidate) -> Tensor");
  m.def(
      "persistent(Tensor a, Tensor b0, Tensor? bias0, int epilogue0, Tensor b1, Tensor? bias1, int epilogue1, int kernel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(stof_bolt, CUDA, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("persistent", TORCH_BOX(&persistent));
}

}  // namespace stof::bolt
