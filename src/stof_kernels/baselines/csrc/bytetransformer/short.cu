// Launches the short kernels: one instantiation per length in tiles of 16.
#include "launch.h"
#include "short.cuh"

namespace stof::bytetransformer {
namespace {

template <int kRows, int kDim>
cudaError_t run_whole(const ShortProblem& p, cudaStream_t stream) {
  const dim3 grid(p.heads, p.batch);
  attend_whole<kRows, kDim><<<grid, 32 * short_warps(kRows, kRows, kDim), 0, stream>>>(p);
  return cudaGetLastError();
}

template <int kRows>
cudaError_t run_slabs(const ShortProblem& p, cudaStream_t stream) {
  constexpr int kDim = 64, kSlab = slab_rows(kRows), kThreads = 32 * short_warps(kRows, kSlab, kDim);
  constexpr int kBytes = short_bytes(kRows, kSlab, kDim);
  static_assert(kThreads <= 1024 && kBytes <= 64 * 1024);
  if (kBytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(attend_slab<kRows, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(p.heads, ceil_div(p.seq_len, kSlab), p.batch);
  attend_slab<kRows, kDim><<<grid, kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_whole(const ShortProblem& p, cudaStream_t stream) {
  if (!fits_whole(p.seq_len, p.head_dim)) return cudaErrorInvalidValue;
  const int rows = ceil_div(p.seq_len, kCell) * kCell;
  switch (rows + (p.head_dim == 16 ? 1 : 0)) {
    case 16: return run_whole<16, 64>(p, stream);
    case 32: return run_whole<32, 64>(p, stream);
    case 48: return run_whole<48, 64>(p, stream);
    case 64: return run_whole<64, 64>(p, stream);
    case 80: return run_whole<80, 64>(p, stream);
    case 17: return run_whole<16, 16>(p, stream);
    case 33: return run_whole<32, 16>(p, stream);
    case 49: return run_whole<48, 16>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_slabs(const ShortProblem& p, cudaStream_t stream) {
  if (!fits_slabs(p.seq_len, p.head_dim)) return cudaErrorInvalidValue;
  switch (ceil_div(p.seq_len, kCell) * kCell) {
    case 96: return run_slabs<96>(p, stream);
    case 112: return run_slabs<112>(p, stream);
    case 128: return run_slabs<128>(p, stream);
    case 144: return run_slabs<144>(p, stream);
    case 160: return run_slabs<160>(p, stream);
    case 176: return run_slabs<176>(p, stream);
    case 192: return run_slabs<192>(p, stream);
    case 208: return run_slabs<208>(p, stream);
    case 224: return run_slabs<224>(p, stream);
    case 240: return run_slabs<240>(p, stream);
    case 256: return run_slabs<256>(p, stream);
    case 272: return run_slabs<272>(p, stream);
    case 288: return run_slabs<288>(p, stream);
    case 304: return run_slabs<304>(p, stream);
    case 320: return run_slabs<320>(p, stream);
    case 336: return run_slabs<336>(p, stream);
    case 352: return run_slabs<352>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace stof::bytetransformer
