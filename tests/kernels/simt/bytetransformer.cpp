// The kernels of baselines/csrc/bytetransformer on the CPU, for ctypes. Launch shapes are those of the .cu files.
#include "context.cuh"
#include "pointwise.cuh"
#include "scores.cuh"
#include "short.cuh"

using namespace stof::bytetransformer;

namespace {

template <int kRows>
void run_slabs(const ShortProblem& p) {
  const unsigned slabs = ceil_div(p.seq_len, slab_rows(kRows)), threads = 32 * short_warps(kRows, slab_rows(kRows), 64);
  simt::launch({unsigned(p.heads), slabs, unsigned(p.batch)}, {threads}, [=] { attend_slab<kRows, 64>(p); });
}
template <int kRows, int kDim>
void run_whole(const ShortProblem& p) {
  simt::launch({unsigned(p.heads), unsigned(p.batch)}, {32u * short_warps(kRows, kRows, kDim)}, [=] { attend_whole<kRows, kDim>(p); });
}

}  // namespace

extern "C" {

void set_descending(int value) { simt::state().descending = value != 0; }

// {path: 1 whole, 2 slabs, 3 long, 0 unfused}, slab, threads, bytes of a length
void shape_of(int seq_len, int head_dim, int* out) {
  const int rows = ceil_div(seq_len, kCell) * kCell;
  const bool whole = fits_whole(seq_len, head_dim), slabs = fits_slabs(seq_len, head_dim);
  const int slab = whole ? rows : slabs ? slab_rows(rows) : 0;
  out[0] = whole ? 1 : slabs ? 2 : fits_long(seq_len, head_dim) ? 3 : 0;
  out[1] = slab, out[2] = slab ? 32 * short_warps(rows, slab, head_dim) : 0, out[3] = slab ? short_bytes(rows, slab, head_dim) : 0;
}
int unfused_fits(int seq_len, int heads) { return fits_unfused(seq_len, heads); }
int threads_of_norm(int columns) { return norm_threads(columns); }

int short_attention(const half_t* qkv, const half_t* bias, const half_t* mask, half_t* out, int batch, int seq_len, int heads,
                    int head_dim, float scale) {
  const ShortProblem p{qkv, bias, mask, out, batch, seq_len, heads, head_dim, scale};
  const int rows = ceil_div(seq_len, kCell) * kCell;
  switch (rows * 100 + head_dim) {
    case 1664: run_whole<16, 64>(p); return 0;
    case 4864: run_whole<48, 64>(p); return 0;
    case 8064: run_whole<80, 64>(p); return 0;
    case 3216: run_whole<32, 16>(p); return 0;
    case 4816: run_whole<48, 16>(p); return 0;
    case 9664: run_slabs<96>(p); return 0;
    case 11264: run_slabs<112>(p); return 0;
    case 12864: run_slabs<128>(p); return 0;
    case 17664: run_slabs<176>(p); return 0;
    case 27264: run_slabs<272>(p); return 0;
    default: return 1;
  }
}

void split(const half_t* qkv, const half_t* bias, half_t* to, int batch, int seq_len, int heads, int dim) {
  simt::launch({unsigned(seq_len), unsigned(batch)}, {unsigned(heads * dim / 2)}, [=] { split_heads(qkv, bias, to, heads, dim); });
}
void merge(const half_t* from, half_t* to, int batch, int seq_len, int heads, int dim) {
  simt::launch({unsigned(seq_len), unsigned(batch)}, {unsigned(heads * dim / 2)}, [=] { merge_heads(from, to, heads, dim); });
}

void long_attention(const half_t* split, const half_t* mask, const int* lengths, half_t* scores, float* partials, float* stats,
                    half_t* out, int batch, int seq_len, int heads, float scale, int blocks) {
  const LongProblem p{split, mask, lengths, scores, partials, stats, out, batch, seq_len, heads, scale};
  simt::launch({unsigned(blocks)}, {kGroupedThreads}, [=] { grouped_scores(p); });
  simt::launch({unsigned(batch), unsigned(heads)}, {unsigned(seq_len)}, [=] { reduce_stats(p); });
  simt::launch({unsigned(blocks)}, {kGroupedThreads}, [=] { grouped_context(p); });
}

// Writes (problem, index, length) of every tile in the order that `blocks` persistent blocks meet them, block after block.
int visit(const int* lengths, int problems, int heads, int blocks, int square, int* out) {
  int count = 0;
  const auto walk = [&](auto visitor) {
    GroupedTile tile;
    for (int number = blockIdx.x; visitor.find(number, tile); number += gridDim.x) {
      if (threadIdx.x != 0) continue;
      out[3 * count] = tile.problem, out[3 * count + 1] = tile.index, out[3 * count + 2] = tile.length;
      ++count;
    }
  };
  simt::launch({unsigned(blocks)}, {32}, [&] {
    if (square) walk(ScoreVisitor(lengths, problems, heads));
    else walk(ContextVisitor(lengths, problems, heads));
  });
  return count;
}

void softmax(half_t* scores, const half_t* mask, int batch, int seq_len, int heads) {
  const dim3 grid{unsigned(batch * seq_len)}, block{32, unsigned(heads)};
  if (seq_len <= 128) simt::launch(grid, block, [=] { masked_softmax<half_t, 4>(scores, mask, seq_len); });
  else simt::launch(grid, block, [=] { masked_softmax<half_t, 0>(scores, mask, seq_len); });
}

void norm(const half_t* x, const half_t* bias, const half_t* residual, const half_t* gamma, const half_t* beta, half_t* out, int rows,
          int columns, float epsilon) {
  const unsigned threads = norm_threads(columns);
  const dim3 grid{unsigned(rows)}, block{threads};
  if (int(threads) * 2 == columns)
    simt::launch(grid, block, [=] { bias_residual_norm<half_t, 1>(x, bias, residual, gamma, beta, out, epsilon); });
  else simt::launch(grid, block, [=] { bias_residual_norm<half_t, 2>(x, bias, residual, gamma, beta, out, epsilon); });
}

void gelu(half_t* x, const half_t* bias, int rows, int columns) {
  const int64_t pairs = int64_t{rows} * columns / 2;
  simt::launch({unsigned((pairs + 255) / 256)}, {256}, [=] { bias_gelu(x, bias, pairs, columns / 2); });
}

}  // extern "C"
