// stof::build_cells and the block-wise layout on CUDA: compact forms, which read sizes back once, and forms that fill given
// buffers without touching the host.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/cuda/problem.h"
#include "cuda_common.h"
#include "format/cuda/format.h"

namespace stof::bindings {
namespace {

using namespace stof::cuda;

constexpr int64_t kCell = 16;
constexpr int kBlocksPerMultiprocessor = 4;  // blocks of the block-wise kernel that run at once

// Capacities go in powers of two from 64: masks of about one size share one shape.
int64_t padded(int64_t n) {
  int64_t capacity = 64;
  while (capacity < n) capacity *= 2;
  return capacity;
}

// Uninitialized int32 of one or two dimensions.
Tensor ints(const Tensor& like, std::initializer_list<int64_t> size) {
  const int64_t width = *(size.end() - 1);
  if (size.size() == 1) return new_on_cuda(like.get_device_index(), size, {1}, aoti_torch_dtype_int32());
  return new_on_cuda(like.get_device_index(), size, {width, 1}, aoti_torch_dtype_int32());
}

DenseMask dense_of(const char* op, const Tensor& keep) {
  STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Bool, op, ": keep has dtype ",
                  torch::headeronly::toString(keep.scalar_type()), ", it must be Bool");
  STD_TORCH_CHECK(keep.dim() == 4, op, ": keep has shape ", shape(keep), ", it must be (batch or 1, heads or 1, Lq, Lk)");
  STD_TORCH_CHECK(keep.size(0) * keep.size(1) * ceil_div(keep.size(2), kCell) * std::max<int64_t>(1, ceil_div(keep.size(3), kCell)) <=
                      std::numeric_limits<int32_t>::max(),
                  op, ": keep has shape ", shape(keep), ", that is more than 2**31 - 1 cells of 16 x 16");
  return {data_of<const uint8_t>(keep), keep.stride(0), keep.stride(1), keep.stride(2), keep.stride(3),
          static_cast<int>(keep.size(1)), static_cast<int>(keep.size(0) * keep.size(1)),
          static_cast<int>(keep.size(2)), static_cast<int>(keep.size(3))};
}

BlockTable table_of(const char* op, const Tensor& keep, int64_t block, int64_t q_len, int64_t kv_len) {
  STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Bool, op, ": keep has dtype ",
                  torch::headeronly::toString(keep.scalar_type()), ", it must be Bool");
  STD_TORCH_CHECK(block >= kCell && block % kCell == 0, op, ": block is ", block, ", it must be a multiple of 16");
  STD_TORCH_CHECK(keep.dim() == 4 && keep.size(2) == ceil_div(q_len, block) && keep.size(3) == ceil_div(kv_len, block),
                  op, ": keep has shape ", shape(keep), ", it must be (batch or 1, heads or 1, ", ceil_div(q_len, block),
                  ", ", ceil_div(kv_len, block), ")");
  const int64_t planes = keep.size(0) * keep.size(1);
  STD_TORCH_CHECK(std::max({q_len, kv_len, block}) <= std::numeric_limits<int32_t>::max() / 2 &&
                      planes * ceil_div(q_len, kCell) <= std::numeric_limits<int32_t>::max() &&
                      ceil_div(std::min(block, q_len), kCell) * ceil_div(kv_len, kCell) <= std::numeric_limits<int32_t>::max(),
                  op, ": keep has shape ", shape(keep), ", q_len is ", q_len, ", kv_len ", kv_len, " and block ", block,
                  ", lengths must stay below 2**30, strips of 16 queries and the cells of a row of blocks below 2**31");
  return {data_of<const uint8_t>(keep), keep.stride(0), keep.stride(1), keep.stride(2), keep.stride(3),
          static_cast<int>(keep.size(1)), static_cast<int>(planes), static_cast<int>(q_len), static_cast<int>(kv_len),
          static_cast<int>(block)};
}

struct Scratch {
  Tensor strips;
  std::optional<Tensor> words, starts;  // of a dense mask, of blocks
  CellScratch view{};
};

template <typename Source>
int64_t strips_of(const Source& mask) {
  return mask.planes * ceil_div(mask.q_len, kCell);
}

Scratch scratch_of(const Tensor& keep, const DenseMask& mask) {
  const int64_t strips = strips_of(mask), row = ceil_div(mask.kv_len, kCell) * kCell;
  Scratch scratch{ints(keep, {strips, 4}), new_on_cuda(keep.get_device_index(), {strips, row}, {row, 1}, aoti_torch_dtype_int16())};
  scratch.view = {data_of<uint16_t>(*scratch.words), data_of<int4>(scratch.strips), nullptr};
  return scratch;
}

Scratch scratch_of(const Tensor& keep, const BlockTable& table) {
  const int64_t rows = table.planes * ceil_div(table.q_len, table.block);
  Scratch scratch{ints(keep, {rows, 4}), std::nullopt, ints(keep, {rows + 1})};
  scratch.view = {nullptr, data_of<int4>(scratch.strips), data_of<int>(*scratch.starts)};
  return scratch;
}

// The steps of either source under one name.
cudaError_t count(const DenseMask& mask, const CellScratch& to, cudaStream_t stream) { return pack_cells(mask, to, stream); }
cudaError_t count(const BlockTable& table, const CellScratch& to, cudaStream_t stream) { return count_blocks(table, to, stream); }
cudaError_t scan(const DenseMask& mask, const CellScratch& from, const CellBuffers& out, cudaStream_t stream) {
  return scan_cells(mask, from, out, stream);
}
cudaError_t scan(const BlockTable& table, const CellScratch& from, const CellBuffers& out, cudaStream_t stream) {
  return scan_blocks(table, from, out, stream);
}
cudaError_t emit(const DenseMask& mask, const CellScratch& from, const CellBuffers& out, cudaStream_t stream) {
  return emit_cells(mask, from, out, stream);
}
cudaError_t emit(const BlockTable& table, const CellScratch& from, const CellBuffers& out, cudaStream_t stream) {
  return emit_blocks(table, from, out, stream);
}

CellBuffers buffers_of(const Tensor& strip_ptr, const Tensor& cell_col, const Tensor& cell_slot, const Tensor& cell_bits,
                       const Tensor& counts) {
  return {data_of<int>(strip_ptr), data_of<int>(cell_col), data_of<int>(cell_slot), data_of<uint16_t>(cell_bits),
          data_of<int64_t>(counts), cell_col.size(0), cell_bits.size(0)};
}

template <typename T, size_t kCount>
std::array<T, kCount> read_back(const char* op, const T* device, cudaStream_t stream) {
  std::array<T, kCount> host;
  check_launch(op, cudaMemcpyAsync(host.data(), device, sizeof(host), cudaMemcpyDeviceToHost, stream));
  check_launch(op, cudaStreamSynchronize(stream));
  return host;
}

using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Lists of exact size, which is read back.
template <typename Source>
Lists exact_lists(const char* op, const Tensor& keep, const Source& mask) {
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  const cudaStream_t stream = current_stream(keep);
  const Scratch scratch = scratch_of(keep, mask);
  Tensor strip_ptr = ints(keep, {strips_of(mask) + 1});
  Tensor counts = torch::stable::new_empty(keep, {4}, ScalarType::Long);
  CellBuffers out{};
  out.strip_ptr = data_of<int>(strip_ptr), out.counts = data_of<int64_t>(counts);
  out.cell_capacity = out.bit_capacity = std::numeric_limits<int32_t>::max();
  check_launch(op, count(mask, scratch.view, stream));
  check_launch(op, scan(mask, scratch.view, out, stream));
  const auto sizes = read_back<int64_t, 4>(op, out.counts, stream);
  STD_TORCH_CHECK(sizes[3] == 0, op, ": the mask has ", sizes[0], " non-empty cells, allowed are ", out.cell_capacity);
  Tensor cell_col = ints(keep, {sizes[0]}), cell_slot = ints(keep, {sizes[0]});
  Tensor cell_bits = torch::stable::new_empty(keep, {sizes[1], kCell}, ScalarType::Short);
  check_launch(op, emit(mask, scratch.view, buffers_of(strip_ptr, cell_col, cell_slot, cell_bits, counts), stream));
  return {strip_ptr, cell_col, cell_slot, cell_bits, counts};
}

void check_lists(const Tensor& strip_ptr, int64_t strips, const Tensor& cell_col, const Tensor& cell_slot,
                 const Tensor& cell_bits, const Tensor& counts) {
  check_list("strip_ptr", strip_ptr, ScalarType::Int, {strips + 1});
  check_list("cell_col", cell_col, ScalarType::Int, {-1});
  check_list("cell_slot", cell_slot, ScalarType::Int, {cell_col.size(0)});
  check_list("cell_bits", cell_bits, ScalarType::Short, {-1, kCell});
  check_list("counts", counts, ScalarType::Long, {4});
}

// The same into given buffers; the host learns nothing.
template <typename Source>
void fill_lists(const char* op, const Tensor& keep, const Source& mask, const Tensor& strip_ptr, const Tensor& cell_col,
                const Tensor& cell_slot, const Tensor& cell_bits, const Tensor& counts) {
  check_lists(strip_ptr, strips_of(mask), cell_col, cell_slot, cell_bits, counts);
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  const cudaStream_t stream = current_stream(keep);
  const Scratch scratch = scratch_of(keep, mask);
  const CellBuffers out = buffers_of(strip_ptr, cell_col, cell_slot, cell_bits, counts);
  check_launch(op, count(mask, scratch.view, stream));
  check_launch(op, scan(mask, scratch.view, out, stream));
  check_launch(op, emit(mask, scratch.view, out, stream));
}

Lists build_cells(Tensor keep) { return exact_lists("build_cells", keep, dense_of("build_cells", keep)); }

void build_cells_out(Tensor keep, Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor counts) {
  constexpr const char* op = "build_cells_out";
  fill_lists(op, keep, dense_of(op, keep), strip_ptr, cell_col, cell_slot, cell_bits, counts);
}

Lists build_blocks(Tensor keep, int64_t block, int64_t q_len, int64_t kv_len) {
  constexpr const char* op = "build_blocks";
  return exact_lists(op, keep, table_of(op, keep, block, q_len, kv_len));
}

void build_blocks_out(Tensor keep, int64_t block, int64_t q_len, int64_t kv_len, Tensor strip_ptr, Tensor cell_col,
                      Tensor cell_slot, Tensor cell_bits, Tensor counts) {
  constexpr const char* op = "build_blocks_out";
  fill_lists(op, keep, table_of(op, keep, block, q_len, kv_len), strip_ptr, cell_col, cell_slot, cell_bits, counts);
}

struct LayoutRequest {
  CellView cells;
  Chunking chunking;
  int q_tile;
  int64_t query_tiles, scratch_ints;
};

LayoutRequest request_of(const char* op, const Tensor& strip_ptr, const Tensor& cell_col, const Tensor& cell_slot,
                         const Tensor& cell_bits, const Tensor& counts, int64_t q_len, int64_t kv_len,
                         int64_t planes, int64_t q_tile, int64_t kv_chunk, int64_t copies) {
  STD_TORCH_CHECK(q_tile == 64 || q_tile == 128, op, ": q_tile is ", q_tile, ", it must be 64 or 128");
  STD_TORCH_CHECK(kv_chunk >= -1 && kv_chunk < (1 << 24), op, ": kv_chunk is ", kv_chunk,
                  ", it must be -1 (from copies), 0 (never cut) or a number of key tiles");
  STD_TORCH_CHECK(copies >= 1, op, ": copies is ", copies, ", it must be at least 1");
  STD_TORCH_CHECK(kv_len <= kMaxLayoutKeys, op, ": kv_len is ", kv_len, ", the block_wise layout takes at most ",
                  kMaxLayoutKeys, "; use row_wise");
  check_lists(strip_ptr, planes * ceil_div(q_len, kCell), cell_col, cell_slot, cell_bits, counts);
  LayoutRequest request;
  request.cells = {data_of<const int>(strip_ptr), data_of<const int>(cell_col), data_of<const int>(cell_slot),
                   data_of<const uint16_t>(cell_bits), data_of<int64_t>(counts), static_cast<int>(planes),
                   static_cast<int>(q_len), static_cast<int>(kv_len)};
  const int multiprocessors = numbers_of(strip_ptr.get_device_index()).multiprocessors;
  request.chunking = {static_cast<int>(kv_chunk), static_cast<int>(copies), multiprocessors * kBlocksPerMultiprocessor};
  request.q_tile = static_cast<int>(q_tile);
  request.query_tiles = planes * ceil_div(q_len, q_tile);
  request.scratch_ints = layout_scratch(request.query_tiles, static_cast<int>(kv_len));
  return request;
}

LayoutBuffers layout_of(const Tensor& ptr, const Tensor& col, const Tensor& slot, const Tensor& bits, int q_tile) {
  int* header = data_of<int>(ptr);
  return {header, header + kHeaderInts, data_of<int>(slot), data_of<int>(col), data_of<uint32_t>(bits), slot.size(0),
          (ptr.size(0) - kHeaderInts) / kCombineInts, col.size(0), bits.size(0), q_tile};
}

// Given buffers, which must have room for every query tile.
LayoutBuffers checked_layout(const char* op, const LayoutRequest& request, const Tensor& ptr, const Tensor& col,
                             const Tensor& slot, const Tensor& bits) {
  check_list("ptr", ptr, ScalarType::Int, {-1});
  check_list("col", col, ScalarType::Int, {-1, 4});
  check_list("slot", slot, ScalarType::Int, {-1, kItemInts});
  check_list("bits", bits, ScalarType::Int, {-1, 2 * request.q_tile});
  STD_TORCH_CHECK(slot.size(0) >= request.query_tiles, op, ": slot has room for ", slot.size(0),
                  " items, it must be at least the ", request.query_tiles, " query tiles");
  return layout_of(ptr, col, slot, bits, request.q_tile);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> build_layout(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot,
                                                                Tensor cell_bits, Tensor counts, int64_t q_len,
                                                                int64_t kv_len, int64_t planes, int64_t q_tile,
                                                                int64_t kv_chunk, int64_t copies) {
  constexpr const char* op = "build_layout";
  const LayoutRequest request = request_of(op, strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len,
                                           planes, q_tile, kv_chunk, copies);
  const torch::stable::accelerator::DeviceGuard guard(strip_ptr.get_device_index());
  const cudaStream_t stream = current_stream(strip_ptr);
  Tensor scratch = ints(strip_ptr, {request.scratch_ints});
  Tensor measured = ints(strip_ptr, {kHeaderInts});
  LayoutBuffers out{};
  out.header = data_of<int>(measured), out.q_tile = request.q_tile;
  check_launch(op, count_tiles(request.cells, request.q_tile, data_of<int>(scratch), stream));
  check_launch(op, schedule_items(request.cells, out, request.chunking, data_of<int>(scratch), stream));
  const auto header = read_back<int, kHeaderInts>(op, out.header, stream);

  Tensor ptr = ints(strip_ptr, {kHeaderInts + kCombineInts * padded(header[2])});
  Tensor col = ints(strip_ptr, {padded(header[3]), 4}), slot = ints(strip_ptr, {padded(header[0]), kItemInts});
  Tensor bits = ints(strip_ptr, {padded(header[4]), 2 * q_tile});
  out = layout_of(ptr, col, slot, bits, request.q_tile);
  check_launch(op, schedule_items(request.cells, out, request.chunking, data_of<int>(scratch), stream));
  check_launch(op, fill_tiles(request.cells, out, data_of<int>(scratch), stream));
  // Whoever gets a layout with its sizes may read it before the kernels of his stream have ended: attention on Hopper does.
  check_launch(op, cudaStreamSynchronize(stream));
  Tensor plan = torch::stable::empty({8}, ScalarType::Long, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int64_t words[8] = {1, q_tile, kv_chunk, 0, header[0], header[1], header[2], header[5]};
  std::copy(words, words + 8, data_of<int64_t>(plan));
  return {ptr, col, slot, bits, plan};
}

// The header alone, on the device: what a layout without cuts would hold.
Tensor layout_sizes(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor counts, int64_t q_len,
                    int64_t kv_len, int64_t planes, int64_t q_tile) {
  constexpr const char* op = "layout_sizes";
  const LayoutRequest request =
      request_of(op, strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len, planes, q_tile, 0, 1);
  const torch::stable::accelerator::DeviceGuard guard(strip_ptr.get_device_index());
  const cudaStream_t stream = current_stream(strip_ptr);
  Tensor scratch = ints(strip_ptr, {request.scratch_ints}), header = ints(strip_ptr, {kHeaderInts});
  LayoutBuffers out{};
  out.header = data_of<int>(header), out.q_tile = request.q_tile;
  check_launch(op, count_tiles(request.cells, request.q_tile, data_of<int>(scratch), stream));
  check_launch(op, schedule_items(request.cells, out, request.chunking, data_of<int>(scratch), stream));
  return header;
}

void build_layout_out(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor counts, int64_t q_len,
                      int64_t kv_len, int64_t planes, int64_t q_tile, int64_t kv_chunk, int64_t copies, Tensor ptr,
                      Tensor col, Tensor slot, Tensor bits) {
  constexpr const char* op = "build_layout_out";
  const LayoutRequest request = request_of(op, strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len,
                                           planes, q_tile, kv_chunk, copies);
  const LayoutBuffers out = checked_layout(op, request, ptr, col, slot, bits);
  const torch::stable::accelerator::DeviceGuard guard(strip_ptr.get_device_index());
  const cudaStream_t stream = current_stream(strip_ptr);
  Tensor scratch = ints(strip_ptr, {request.scratch_ints});
  check_launch(op, count_tiles(request.cells, request.q_tile, data_of<int>(scratch), stream));
  check_launch(op, schedule_items(request.cells, out, request.chunking, data_of<int>(scratch), stream));
  check_launch(op, fill_tiles(request.cells, out, data_of<int>(scratch), stream));
}

// build_blocks_out and build_layout_out, in two launches where the blocks are made of whole tiles.
void build_blocks_layout_out(Tensor keep, int64_t block, int64_t q_len, int64_t kv_len, Tensor strip_ptr, Tensor cell_col,
                             Tensor cell_slot, Tensor cell_bits, Tensor counts, int64_t q_tile, int64_t kv_chunk,
                             int64_t copies, Tensor ptr, Tensor col, Tensor slot, Tensor bits) {
  constexpr const char* op = "build_blocks_layout_out";
  const BlockTable table = table_of(op, keep, block, q_len, kv_len);
  const LayoutRequest request = request_of(op, strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len, table.planes,
                                           q_tile, kv_chunk, copies);
  if (!builds_together(table, request.q_tile)) {
    fill_lists(op, keep, table, strip_ptr, cell_col, cell_slot, cell_bits, counts);
    build_layout_out(strip_ptr, cell_col, cell_slot, cell_bits, counts, q_len, kv_len, table.planes, q_tile, kv_chunk, copies,
                     ptr, col, slot, bits);
    return;
  }
  const LayoutBuffers out = checked_layout(op, request, ptr, col, slot, bits);
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  Tensor scratch = ints(keep, {together_scratch(table, request.q_tile)});
  const CellBuffers lists = buffers_of(strip_ptr, cell_col, cell_slot, cell_bits, counts);
  check_launch(op, build_together(table, lists, out, request.chunking, data_of<int>(scratch), current_stream(keep)));
}

// Buffers of a fixed-capacity layout: room for `tiles` key tiles, of which `slots` have a bitmap, and every cut that kv_chunk
// may ask for.
std::tuple<Tensor, Tensor, Tensor, Tensor> empty_layout(Tensor strip_ptr, int64_t q_len, int64_t planes, int64_t q_tile,
                                                        int64_t kv_chunk, int64_t copies, int64_t tiles, int64_t slots) {
  constexpr const char* op = "empty_layout";
  STD_TORCH_CHECK(q_tile == 64 || q_tile == 128, op, ": q_tile is ", q_tile, ", it must be 64 or 128");
  STD_TORCH_CHECK(copies >= 1 && tiles >= 0 && slots >= 0, op, ": copies is ", copies, ", tiles ", tiles, " and slots ",
                  slots, ", they must be at least 1, 0 and 0");
  const int multiprocessors = numbers_of(strip_ptr.get_device_index()).multiprocessors;
  // Cutting at the fair share of the blocks adds at most that many items over all copies.
  const int64_t cuts = kv_chunk < 0    ? std::min(ceil_div(multiprocessors * kBlocksPerMultiprocessor, copies), tiles)
                       : kv_chunk == 0 ? 0
                                       : tiles / kv_chunk;
  const int64_t items = planes * ceil_div(q_len, q_tile) + cuts;
  return {ints(strip_ptr, {kHeaderInts + kCombineInts * cuts}), ints(strip_ptr, {tiles, 4}),
          ints(strip_ptr, {items, kItemInts}), ints(strip_ptr, {slots, 2 * q_tile})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stof, m) {
  m.def(
      "build_cells_out(Tensor keep, Tensor(a!) strip_ptr, Tensor(b!) cell_col, Tensor(c!) cell_slot, "
      "Tensor(d!) cell_bits, Tensor(e!) counts) -> ()");
  m.def(
      "build_blocks(Tensor keep, SymInt block, SymInt q_len, SymInt kv_len) -> (Tensor strip_ptr, Tensor cell_col, "
      "Tensor cell_slot, Tensor cell_bits, Tensor counts)");
  m.def(
      "build_blocks_out(Tensor keep, SymInt block, SymInt q_len, SymInt kv_len, Tensor(a!) strip_ptr, Tensor(b!) cell_col, "
      "Tensor(c!) cell_slot, Tensor(d!) cell_bits, Tensor(e!) counts) -> ()");
  m.def(
      "build_blocks_layout_out(Tensor keep, SymInt block, SymInt q_len, SymInt kv_len, Tensor(a!) strip_ptr, "
      "Tensor(b!) cell_col, Tensor(c!) cell_slot, Tensor(d!) cell_bits, Tensor(e!) counts, int q_tile, int kv_chunk, "
      "SymInt copies, Tensor(f!) ptr, Tensor(g!) col, Tensor(h!) slot, Tensor(i!) bits) -> ()");
  m.def(
      "layout_sizes(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor counts, SymInt q_len, "
      "SymInt kv_len, SymInt planes, int q_tile) -> Tensor");
  m.def(
      "build_layout(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor counts, SymInt q_len, "
      "SymInt kv_len, SymInt planes, int q_tile, int kv_chunk, SymInt copies) -> (Tensor ptr, Tensor col, Tensor slot, "
      "Tensor bits, Tensor plan)");
  m.def(
      "build_layout_out(Tensor strip_ptr, Tensor cell_col, Tensor cell_slot, Tensor cell_bits, Tensor(e!) counts, "
      "SymInt q_len, SymInt kv_len, SymInt planes, int q_tile, int kv_chunk, SymInt copies, Tensor(a!) ptr, "
      "Tensor(b!) col, Tensor(c!) slot, Tensor(d!) bits) -> ()");
  m.def(
      "empty_layout(Tensor strip_ptr, SymInt q_len, SymInt planes, int q_tile, int kv_chunk, SymInt copies, "
      "SymInt tiles, SymInt slots) -> (Tensor ptr, Tensor col, Tensor slot, Tensor bits)");
}

STABLE_TORCH_LIBRARY_IMPL(stof, CUDA, m) {
  m.impl("build_cells", TORCH_BOX(&build_cells));
  m.impl("build_cells_out", TORCH_BOX(&build_cells_out));
  m.impl("build_blocks", TORCH_BOX(&build_blocks));
  m.impl("build_blocks_out", TORCH_BOX(&build_blocks_out));
  m.impl("build_blocks_layout_out", TORCH_BOX(&build_blocks_layout_out));
  m.impl("layout_sizes", TORCH_BOX(&layout_sizes));
  m.impl("build_layout", TORCH_BOX(&build_layout));
  m.impl("build_layout_out", TORCH_BOX(&build_layout_out));
  m.impl("empty_layout", TORCH_BOX(&empty_layout));
}

}  // namespace stof::bindings
