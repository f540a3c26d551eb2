// Launches the three grouped kernels of the long path.
#include <mutex>

#include "context.cuh"
#include "launch.h"
#include "scores.cuh"

namespace stof::bytetransformer {
namespace {

// Blocks of the kernel that fit on a multiprocessor, asked once per process: a process drives cards of one architecture.
template <auto kKernel>
cudaError_t blocks_of(int& blocks) {
  static std::mutex mutex;
  static int known = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known == 0) {
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&known, kKernel, kGroupedThreads, 0);
    if (error != cudaSuccess) return error;
  }
  blocks = known;
  return cudaSuccess;
}

int smaller(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

}  // namespace

cudaError_t launch_grouped(const LongProblem& p, int multiprocessors, cudaStream_t stream) {
  if (!fits_long(p.seq_len, kLongDim)) return cudaErrorInvalidValue;
  const int down = ceil_div(p.seq_len, kScoreTile), rows = ceil_div(p.seq_len, kContextTile);
  const int64_t planes = static_cast<int64_t>(p.batch) * p.heads;
  int score_blocks = 0, context_blocks = 0;
  cudaError_t error = blocks_of<&grouped_scores>(score_blocks);
  if (error == cudaSuccess) error = blocks_of<&grouped_context>(context_blocks);
  if (error != cudaSuccess) return error;
  grouped_scores<<<smaller(planes * down * down, int64_t{score_blocks} * multiprocessors), kGroupedThreads, 0, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  reduce_stats<<<dim3(p.batch, p.heads), p.seq_len, 0, stream>>>(p);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  grouped_context<<<smaller(planes * rows, int64_t{context_blocks} * multiprocessors), kGroupedThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace stof::bytetransformer
