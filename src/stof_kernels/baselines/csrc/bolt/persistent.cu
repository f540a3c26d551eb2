#include "launch.cuh"
#include "persistent.cuh"

namespace stof::bolt {

template <int kN0, int kN1>
cudaError_t launch_registers(const PersistentProblem& p, cudaStream_t stream) {
  return launch(&register_kernel<kN0, kN1>, dim3(ceil_div(p.m, kPersistentRows)), 32 * kPersistentWarps,
                persistent_bytes(kN0, kN1, false), stream, p);
}
template <int kN0, int kN1>
cudaError_t launch_shared(const PersistentProblem& p, cudaStream_t stream) {
  return launch(&shared_kernel<kN0, kN1>, dim3(ceil_div(p.m, kPersistentRows)), 32 * kPersistentWarps, persistent_bytes(kN0, kN1, true),
                stream, p);
}

#define STOF_COMPILE(n0, n1) template cudaError_t launch_registers<n0, n1>(const PersistentProblem&, cudaStream_t);
STOF_BOLT_REGISTERS(STOF_COMPILE)
#undef STOF_COMPILE
#define STOF_COMPILE(n0, n1) template cudaError_t launch_shared<n0, n1>(const PersistentProblem&, cudaStream_t);
STOF_BOLT_SHARED(STOF_COMPILE)
#undef STOF_COMPILE

}  // namespace stof::bolt
