// Block-wise attention on Hopper for short calls: what the warpgroups of a block have in the end, and the other block of a
// cluster, becomes rows of the output, in a fixed order.
#pragma once

#include "common.cuh"
#include "hopper_rows.cuh"
#include "hopper_split_config.cuh"

namespace stof::cuda {

template <class C>
class HopperJoin {
  using T = typename C::T;

 public:
  __device__ HopperJoin(const Problem& p, const BlockLayout& layout, uint32_t memory)
      : p(p), layout(layout), memory(memory), item{memory} {}

  // Results of a warpgroup's warp, once all its warps are done with their tiles.
  __device__ void hand_over(const HopperRows<C>& rows, int group, int warp, int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t to = result_at(group, warp * 16 + r * 8 + (lane >> 2));
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
        store_shared(to + (lane & 3) * 8 + n * 32, make_float2(rows.o[n * 4 + r * 2], rows.o[n * 4 + r * 2 + 1]));
      if ((lane & 3) == 0) store_shared(to + C::kDim * 4, make_float2(rows.shift[r], rows.row_sum[r]));
    }
  }

  // Every row of an item that this block has to itself. All threads share the rows evenly, whoever had tiles: one path for all is
  // shorter than handing each what it needs.
  __device__ void join_all(int active) const {
    const int4 place = item.place(), more = item.more();
#pragma unroll
    for (int first = 0; first < C::kRows * C::kChunks; first += C::kThreads) {
      const int unit = first + static_cast<int>(threadIdx.x), row = unit / C::kChunks, chunk = unit % C::kChunks;
      write(joined(row, chunk, active), row, chunk, place, more);
    }
  }

  // Half of the rows of an item that two blocks share: what this one has of the other half goes there first. Stores to the other
  // block's shared memory count at its barrier, and are all that the two exchange: no block leaves before it got them.
  __device__ void join_half(int active) const {
    constexpr int kUnits = C::kSharedRows * C::kChunks;
    cluster_wait();  // the other one's barrier is there
#pragma unroll
    for (int first = 0; first < 2 * kUnits; first += C::kThreads) {
      const int thread = first + static_cast<int>(threadIdx.x), unit = thread % kUnits;
      const bool sends = thread < kUnits;
      const int row = unit / C::kChunks, chunk = unit % C::kChunks;
      const int tile_row = (sends ? cluster_rank() ^ 1 : cluster_rank()) * C::kSharedRows + row;
      Joined x = joined(tile_row, chunk, active);
      if (sends) {
        send_half(x, unit, row, chunk);
      } else {
        const int4 place = item.place(), more = item.more();
        receive(x, unit, row);
        write(x, tile_row, chunk, place, more);
      }
    }
  }

 private:
  const Problem& p;
  const BlockLayout& layout;
  const uint32_t memory;
  const HopperSplitItem<C> item;

  // A chunk of a row, relative to the row's maximum.
  struct Joined {
    float top, sum, o[8];

    __device__ void add(int e, const float4& part, float weight) {
      o[e] = fmaf(part.x, weight, o[e]), o[e + 1] = fmaf(part.y, weight, o[e + 1]);
      o[e + 2] = fmaf(part.z, weight, o[e + 2]), o[e + 3] = fmaf(part.w, weight, o[e + 3]);
    }
  };

  __device__ uint32_t result_at(int group, int row) const { return memory + group * C::kGroupBytes + row * C::kResultRowBytes; }

  // The sums of the warpgroups with tiles relative to their largest maximum.
  __device__ Joined joined(int row, int chunk, int active) const {
    const int turned = chunk >> 2 & 1;  // half of the threads read the second half first: no bank conflicts
    float2 stat[C::kGroups];
    Joined x{-INFINITY, 0.f, {}};
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      stat[g] = make_float2(-INFINITY, 0.f);
      if (g < active) stat[g] = load_floats2(result_at(g, row) + C::kDim * 4);
      x.top = fmaxf(x.top, stat[g].x);
    }
    const float offset = x.top == -INFINITY ? 0.f : x.top;
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      if (g >= active) break;
      const float weight = exp2_fast(stat[g].x - offset);
      x.sum = fmaf(stat[g].y, weight, x.sum);
#pragma unroll
      for (int h = 0; h < 2; ++h) x.add(h * 4, load_floats4(result_at(g, row) + chunk * 32 + (h ^ turned) * 16), weight);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = turned ? x.o[e + 4] : x.o[e], high = turned ? x.o[e] : x.o[e + 4];
      x.o[e] = low, x.o[e + 4] = high;
    }
    return x;
  }

  // ---- between the blocks of a cluster ----------------------------------------------------------------------------------

  // What comes: first and second halves of all chunks, then a maximum and a sum a row.
  __device__ uint32_t inbox_half(int unit, int half) const {
    return memory + C::kInboxAt + (half * C::kSharedRows * C::kChunks + unit) * 16;
  }
  __device__ uint32_t inbox_stat(int row) const { return memory + C::kInboxAt + C::kSharedRows * C::kDim * 4 + row * 8; }

  __device__ void send_half(const Joined& x, int unit, int row, int chunk) const {
    const uint32_t barrier = in_other_block(item.inbox_full());
#pragma unroll
    for (int h = 0; h < 2; ++h)
      send(in_other_block(inbox_half(unit, h)), make_float4(x.o[h * 4], x.o[h * 4 + 1], x.o[h * 4 + 2], x.o[h * 4 + 3]), barrier);
    if (chunk == 0) send(in_other_block(inbox_stat(row)), make_float2(x.top, x.sum), barrier);
  }

  // Adds what the other block has, once it is here.
  __device__ void receive(Joined& x, int unit, int row) const {
    barrier_wait_cluster(item.inbox_full(), 0);
    const float2 other = load_floats2(inbox_stat(row));
    const float top = fmaxf(x.top, other.x), offset = top == -INFINITY ? 0.f : top;
    const float keeps = exp2_fast(x.top - offset), adds = exp2_fast(other.x - offset);
    x.top = top, x.sum = fmaf(other.y, adds, x.sum * keeps);
#pragma unroll
    for (int e = 0; e < 8; ++e) x.o[e] *= keeps;
#pragma unroll
    for (int h = 0; h < 2; ++h) x.add(h * 4, load_floats4(inbox_half(unit, h)), adds);
  }

  // ---- to memory --------------------------------------------------------------------------------------------------------

  __device__ void write(const Joined& x, int row, int chunk, const int4& place, const int4& more) const {
    if (more.z < 0) write_output(x, row, chunk, place);
    else write_part(x, row, chunk, more);
  }

  __device__ void write_output(const Joined& x, int tile_row, int chunk, const int4& place) const {
    const int row = place.x + tile_row;
    if (row >= p.q_len || chunk * 8 >= p.head_dim) return;
    const float scale = x.sum == 0.f ? 0.f : reciprocal_fast(x.sum);
    T* out = static_cast<T*>(p.out) + place.y * p.out_stride.batch + place.z * p.out_stride.head;
    *reinterpret_cast<uint4*>(out + row * p.out_stride.row + chunk * 8) =
        make_uint4(Element<T>::pack(x.o[0] * scale, x.o[1] * scale), Element<T>::pack(x.o[2] * scale, x.o[3] * scale),
                   Element<T>::pack(x.o[4] * scale, x.o[5] * scale), Element<T>::pack(x.o[6] * scale, x.o[7] * scale));
    if (chunk == 0 && p.lse != nullptr)
      p.lse[lse_index(p, {place.y, place.z, place.w}, row)] = x.sum == 0.f ? -INFINITY : (x.top + log2_fast(x.sum)) * kLn2;
  }

  // Sums of a part of a query tile whose key list was cut, joined later by the combine kernel.
  __device__ void write_part(const Joined& x, int tile_row, int chunk, const int4& more) const {
    if (chunk * 8 >= p.head_dim) return;
    const int64_t row = (static_cast<int64_t>(more.z) * layout.copies + more.w) * C::kRows + tile_row;
    float4* to = reinterpret_cast<float4*>(layout.part_out + row * p.head_dim + chunk * 8);
    to[0] = make_float4(x.o[0], x.o[1], x.o[2], x.o[3]), to[1] = make_float4(x.o[4], x.o[5], x.o[6], x.o[7]);
    if (chunk == 0) layout.part_stat[row] = make_float2(x.top, x.sum);
  }
};

}  // namespace stof::cuda
