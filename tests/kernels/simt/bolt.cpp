// The kernels of baselines/csrc/bolt on the CPU, for ctypes. Launch shapes are those of the .cu files.
#include <algorithm>

#include "gemm.cuh"
#include "persistent.cuh"

using namespace stof::bolt;

namespace {

template <typename T>
void run(const GemmProblem& p) {
  if (size_t(T::kSharedBytes) > kSharedLimit) simt::die("more shared memory than a block may have");
  const Grid grid = grid_of(p.m, p.n, p.batch, T::kM, T::kN);
  simt::launch({grid.x, grid.y, grid.z}, {unsigned(T::kThreads)}, [=] { gemm_kernel<T>(p, grid.log); });
}

template <typename Kernel>
void run_persistent(const PersistentProblem& p, const Kernel& kernel) {
  simt::launch({unsigned(ceil_div(p.m, kPersistentRows))}, {32u * kPersistentWarps}, kernel);
}

}  // namespace

extern "C" {

void set_descending(int value) { simt::state().descending = value != 0; }

// {m, n, k, stages, warps along m, n, k, k of the instruction, bytes of shared memory} of each candidate; their number
int candidates(int* out) {
#define STOF_ROW(m, n, k, s, wm, wn, wk, ik)                                                                      \
  {                                                                                                               \
    const int row[9] = {m, n, k, s, wm, wn, wk, ik, Tile<m, n, k, s, wm, wn, wk, ik>::kSharedBytes};              \
    out = std::copy(row, row + 9, out), ++count;                                                                  \
  }
  int count = 0;
  STOF_BOLT_ALL(STOF_ROW)
  return count;
}

// {n0, n1, in shared memory, bytes} of each persistent kernel; their number
int persistent_kernels(int* out) {
  int count = 0;
#define STOF_ROW_R(n0, n1) *out++ = n0, *out++ = n1, *out++ = 0, *out++ = persistent_bytes(n0, n1, false), ++count;
#define STOF_ROW_S(n0, n1) *out++ = n0, *out++ = n1, *out++ = 1, *out++ = persistent_bytes(n0, n1, true), ++count;
  STOF_BOLT_REGISTERS(STOF_ROW_R)
  STOF_BOLT_SHARED(STOF_ROW_S)
  return count;
}

// {x, y, z, log} of the grid
void grid(int m, int n, int batch, int tile_m, int tile_n, int* out) {
  const Grid g = grid_of(m, n, batch, tile_m, tile_n);
  out[0] = int(g.x), out[1] = int(g.y), out[2] = int(g.z), out[3] = g.log;
}

int gemm(const half_t* a, const half_t* b, const half_t* bias, half_t* d, int m, int n, int k, int batch, int epilogue, int candidate) {
  const GemmProblem p{a, b, bias, d, m, n, k, batch, epilogue};
  int number = 0;
#define STOF_CASE(...) \
  if (candidate == number++) return run<Tile<__VA_ARGS__>>(p), 0;
  STOF_BOLT_ALL(STOF_CASE)
  return 1;
}

int persistent(const half_t* a, const half_t* b0, const half_t* bias0, const half_t* b1, const half_t* bias1, half_t* d, int m, int k,
               int epilogue0, int epilogue1, int n0, int n1, int in_shared) {
  const PersistentProblem p{a, b0, bias0, b1, bias1, d, m, k, epilogue0, epilogue1};
#define STOF_CASE_R(i, j) \
  if (!in_shared && n0 == i && n1 == j) return run_persistent(p, [=] { register_kernel<i, j>(p); }), 0;
#define STOF_CASE_S(i, j) \
  if (in_shared && n0 == i && n1 == j) return run_persistent(p, [=] { shared_kernel<i, j>(p); }), 0;
  STOF_BOLT_REGISTERS(STOF_CASE_R)
  STOF_BOLT_SHARED(STOF_CASE_S)
  return 1;
}

}  // extern "C"
