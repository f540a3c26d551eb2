// The main loop, epilogues and launch of the block-wise kernel.
#pragma once

#include "block_wise.cuh"
#include "launch.h"

namespace stof::cuda {

// Every key tile of one work item.
template <class C>
__device__ __forceinline__ void BlockWise<C>::run(const int* item) {
  const int4 head = __ldg(reinterpret_cast<const int4*>(item));
  const int2 more = __ldg(reinterpret_cast<const int2*>(item) + 2);
  k = head_base(p.k, p.k_stride, at.kv_head);
  v = head_base(p.v, p.v_stride, at.kv_head);
  k_offset = lane / C::kChunks * row_bytes(p.k_stride) + lane % C::kChunks * 16;
  v_offset = lane / C::kChunks * row_bytes(p.v_stride) + lane % C::kChunks * 16;
  first_tile = head.y;
  full_tiles = more.x;
  first_slot = more.y;
  const int steps = (head.z - group + C::kGroups - 1) / C::kGroups * C::kSteps;  // of this group

  // The item carries its first tile's runs, so the first keys need not wait for the column list.
  load_queries();
  Runs next;
#pragma unroll
  for (int r = 0; r < kWarpRuns; ++r) next.col[r] = 0;
  if (steps > 0) {
    if (group == 0) {
#pragma unroll
      for (int r = 0; r < kWarpRuns; ++r) next.col[r] = __ldg(item + 8 + warp * kWarpKeys / kRun + r);
    } else {
      next = runs_of(0);
    }
    load_step(0, next);
  }
  copy_async_commit();
#pragma unroll
  for (int s = 1; s < C::kStages - 1; ++s) {
    if (s < steps) load_step(s, runs_of(s));
    copy_async_commit();
  }
  if (C::kStages - 1 < steps) next = runs_of(C::kStages - 1);

#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) row_max[m][r] = -INFINITY, row_sum[m][r] = 0.f;
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[m][n][e] = 0.f;
  }
  if (C::kQueriesInRegisters) {
    copy_async_wait<C::kStages - 2>();
    sync();
#pragma unroll
    for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
      for (int k = 0; k < C::kDim / 16; ++k) query_fragment(q[m][k], m, k);
  }

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<C::kStages - 2>();
    sync();  // the step has arrived for all, and all are done with the stage that is refilled now
    if (step + C::kStages - 1 < steps) {
      load_step(step + C::kStages - 1, next);
      if (step + C::kStages < steps) next = runs_of(step + C::kStages);
    }
    copy_async_commit();
    uint32_t words[C::kBlocks];
    words_of(step, words);  // arrives under the product below

    const uint32_t keys = stage(step % C::kStages);
    float s[C::kBlocks][C::kKeys / 8][4];
    scores(s, keys);
    if (C::kBias || own_tile(step) >= full_tiles) mask_scores(s, words, step);
    softmax(s);
    accumulate(s, keys + C::kKeys * C::kRowBytes);
  }
  copy_async_wait<0>();
  finish_rows();
}

// Row sums are kept per thread until here; the four threads of a row join them.
template <class C>
__device__ __forceinline__ void BlockWise<C>::finish_rows() {
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[m][r] += __shfl_xor_sync(0xffffffffu, row_sum[m][r], 1);
      row_sum[m][r] += __shfl_xor_sync(0xffffffffu, row_sum[m][r], 2);
      if (!C::kBias) row_max[m][r] *= p.scale_log2;
    }
}

// The groups hand their state to group 0, which joins them in the order of the groups.
template <class C>
__device__ __forceinline__ void BlockWise<C>::merge_groups(float* shared) {
  const int thread = warp * 32 + lane;
  sync();  // all warps of the group have left the ring that is written now
  if (group > 0) {
    float* own = shared + group * (C::kGroupBytes / 4) + thread;
#pragma unroll
    for (int m = 0; m < C::kBlocks; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r, own += 2 * C::kThreads) own[0] = row_max[m][r], own[C::kThreads] = row_sum[m][r];
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e, own += C::kThreads) own[0] = o[m][n][e];
    }
  }
  __syncthreads();
  if (group > 0) return;
  for (int g = 1; g < C::kGroups; ++g) {
    const float* other = shared + g * (C::kGroupBytes / 4) + thread;
#pragma unroll
    for (int m = 0; m < C::kBlocks; ++m) {
      float mine[2], theirs[2];
#pragma unroll
      for (int r = 0; r < 2; ++r, other += 2 * C::kThreads) {
        const float top = fmaxf(row_max[m][r], other[0]), offset = top == -INFINITY ? 0.f : top;
        mine[r] = exp2_fast(row_max[m][r] - offset);
        theirs[r] = exp2_fast(other[0] - offset);
        row_max[m][r] = top;
        row_sum[m][r] = row_sum[m][r] * mine[r] + other[C::kThreads] * theirs[r];
      }
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e, other += C::kThreads)
          o[m][n][e] = o[m][n][e] * mine[e >> 1] + other[0] * theirs[e >> 1];
    }
  }
}

// Normalized output through shared memory, so that global stores are whole 16-byte chunks of consecutive lanes.
template <class C>
__device__ __forceinline__ void BlockWise<C>::write_output(unsigned char* shared) {
  const int warp_row = warp * C::kBlocks * 16;
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + m * 16 + r * 8 + (lane >> 2);
      const float sum = row_sum[m][r], scale = sum == 0.f ? 0.f : reciprocal_fast(sum);
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
        *reinterpret_cast<uint32_t*>(shared + chunk_offset<C::kChunks>(row, n) + (lane & 3) * 4) =
            Element<T>::pack(o[m][n][2 * r] * scale, o[m][n][2 * r + 1] * scale);
      if (p.lse != nullptr && (lane & 3) == 0 && row0 + row < p.q_len)
        p.lse[lse_index(p, at, row0 + row)] = sum == 0.f ? -INFINITY : (row_max[m][r] + log2_fast(sum)) * kLn2;
    }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + at.batch * p.out_stride.batch + at.head * p.out_stride.head;
#pragma unroll
  for (int j = 0; j < C::kBlocks * 16 * C::kChunks / 32; ++j) {
    const int row = warp_row + (lane + 32 * j) / C::kChunks, chunk = (lane + 32 * j) % C::kChunks;
    if (row0 + row < p.q_len && chunk * 8 < p.head_dim)
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row0 + row) * p.out_stride.row + chunk * 8) =
          *reinterpret_cast<const uint4*>(shared + chunk_offset<C::kChunks>(row, chunk));
  }
}

// A part of a query tile whose key list was cut: unnormalized sums, joined later by the combine kernel.
template <class C>
__device__ __forceinline__ void BlockWise<C>::write_part(int part, int copy) {
  const int64_t first = (static_cast<int64_t>(part) * layout.copies + copy) * C::kRows;
#pragma unroll
  for (int m = 0; m < C::kBlocks; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + (warp * C::kBlocks + m) * 16 + r * 8 + (lane >> 2);
      if ((lane & 3) == 0) layout.part_stat[row] = make_float2(row_max[m][r], row_sum[m][r]);
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n) {
        if (n * 8 >= p.head_dim) break;
        *reinterpret_cast<float2*>(layout.part_out + row * p.head_dim + n * 8 + (lane & 3) * 2) =
            make_float2(o[m][n][2 * r], o[m][n][2 * r + 1]);
      }
    }
}

template <class C, int kMinBlocks>
__global__ void __launch_bounds__(C::kThreads* C::kGroups, kMinBlocks)
    block_wise_kernel(const __grid_constant__ Problem p, const __grid_constant__ BlockLayout layout) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int saved[6];
  const Assignment mine = assignment_of(layout, blockIdx.x);
  if (!layout.exact) {
    if (layout.header[6] != 0 || p.counts[3] != 0) {
      fill_with_nan<typename C::T>(p);
      return;
    }
    if (mine.item >= layout.header[0]) return;
  }
  const int group = C::kGroups == 1 ? 0 : threadIdx.x / C::kThreads;
  BlockWise<C> work(p, layout, shared_address(shared) + group * C::kGroupBytes, group);
  const int* item = layout.items + static_cast<int64_t>(mine.item) * kItemInts;
  work.row0 = __ldg(item) * C::kRows;
  work.at = instance_of(p, __ldg(item + 6), mine.copy);
  if (threadIdx.x == 0) {
    // The loop has no registers to hold what only the epilogue needs.
    saved[0] = work.row0, saved[1] = work.at.batch, saved[2] = work.at.head;
    saved[3] = __ldg(item + 3), saved[4] = mine.copy;
  }
  work.run(item);
  if (C::kGroups > 1) {
    work.merge_groups(reinterpret_cast<float*>(shared));
    if (group > 0) return;
  } else {
    __syncthreads();  // all warps have left the ring, where the output is staged
  }
  work.row0 = saved[0];
  work.at = {saved[1], saved[2], 0};
  if (saved[3] < 0) work.write_output(shared);
  else work.write_part(saved[3], saved[4]);
}

template <class C, int kMinBlocks>
cudaError_t launch_block_wise_as(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};  // devices whose shared-memory limit is raised
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto kernel = block_wise_kernel<C, kMinBlocks>;
  error = allow_shared_memory(kernel, C::kSharedBytes, prepared, device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(layout.item_limit) * layout.copies;
  kernel<<<static_cast<unsigned>(blocks), C::kThreads * C::kGroups, C::kSharedBytes, stream>>>(problem, layout);
  return cudaGetLastError();
}

}  // namespace stof::cuda

// Defines one launcher; the translation units that instances.py generates consist of these.
#define STOF_BLOCK_WISE(name, T, dim, warps, blocks, keys, stages, groups, bias, min_blocks)                      \
  namespace stof::cuda {                                                                                          \
  cudaError_t name(const Problem& problem, const BlockLayout& layout, cudaStream_t stream) {                      \
    using Config = BlockConfig<T, dim, warps, blocks, keys, stages, groups, bias>;                                \
    return launch_block_wise_as<Config, min_blocks>(problem, layout, stream);                                     \
  }                                                                                                               \
  }
