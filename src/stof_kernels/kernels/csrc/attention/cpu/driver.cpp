// Schedules one attention call: which keys to pack, in which order the strips run, on which instruction set.
//
// Every strip of 16 queries is computed by one thread from start to end, so the number of threads cannot
// change a result; the order of the strips only decides how evenly the threads finish.
#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "variant.h"

namespace stof::cpu {
namespace {

// Packed keys (and values) held at a time: they should survive in a shared cache until their strips run.
constexpr int64_t kPackedBytes = int64_t(16) << 20;

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kSerialWork = 1'000'000;

// What this machine can run, widest first.
std::vector<const Variant*> runnable() {
  std::vector<const Variant*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::variant());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi"))
    found.push_back(&avx2::variant());
#endif
  found.push_back(&baseline::variant());
  return found;
}

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> variant{runnable().front()};
  return variant;
}

const Variant& kernels() { return *chosen().load(std::memory_order_relaxed); }

// Work items handed out one after another (a few at a time when there are many) to whichever worker is free.
void for_each(const Workers& workers, int64_t items, bool serial, const std::function<void(int64_t)>& body) {
  if (serial || workers.count <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t grain = std::clamp<int64_t>(items / (workers.count * int64_t(64)), 1, 16);
  workers.run(int(std::min<int64_t>(workers.count, items)), [&](int) {
    for (;;) {
      const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
      if (first >= items) return;
      for (int64_t i = first; i < std::min(first + grain, items); ++i) body(i);
    }
  });
}

// Packed keys and values. One block of up to kPackedBytes outlives the call: fresh memory costs a page fault
// per 4 KiB, as much time as packing into it.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : bytes_((floats * int64_t(sizeof(float)) + 63) / 64 * 64 + 64) {
    {
      const std::lock_guard<std::mutex> hold(kept().mutex);
      if (kept().bytes >= bytes_) std::swap(block_, static_cast<Block&>(kept()));
    }
    if (block_.data == nullptr) {
      block_.data = static_cast<float*>(std::aligned_alloc(64, size_t(bytes_)));
      block_.bytes = bytes_;
      if (block_.data == nullptr) throw std::bad_alloc();
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (block_.bytes <= kPackedBytes + 64) {
      const std::lock_guard<std::mutex> hold(kept().mutex);
      if (kept().bytes < block_.bytes) std::swap(block_, static_cast<Block&>(kept()));
    }
    std::free(block_.data);
  }
  float* data() const { return block_.data; }

 private:
  struct Block {
    float* data = nullptr;
    int64_t bytes = 0;
  };
  struct Kept : Block {
    std::mutex mutex;
  };
  static Kept& kept() {
    static Kept* block = new Kept;  // never destroyed: a call may still run while the process ends
    return *block;
  }

  Block block_;
  int64_t bytes_;
};

struct Task {
  int32_t head;  // b * heads + h
  int32_t strip;
};

int64_t strip_length(const Mask& m, int64_t plane, int64_t strip) {
  const int32_t* ptr = m.ptr + plane * m.strips + strip;
  return ptr[1] - ptr[0];
}

// Strips of the heads [first, last), longest first by power of two, so that heads stay together inside a
// class: their packed keys are then read from a near cache.
std::vector<Task> ordered_tasks(const Problem& p, int64_t first, int64_t last) {
  const Mask& m = p.mask;
  const auto length_class = [](int64_t length) {
    return length == 0 ? 0 : 64 - __builtin_clzll(uint64_t(length));
  };
  int64_t start[66] = {};
  for (int64_t head = first; head < last; ++head) {
    const int64_t plane = m.plane(head / p.heads, head % p.heads);
    for (int64_t s = 0; s < m.strips; ++s) ++start[64 - length_class(strip_length(m, plane, s)) + 1];
  }
  for (int i = 1; i < 66; ++i) start[i] += start[i - 1];
  std::vector<Task> tasks((last - first) * m.strips);
  for (int64_t head = first; head < last; ++head) {
    const int64_t plane = m.plane(head / p.heads, head % p.heads);
    for (int64_t s = 0; s < m.strips; ++s)
      tasks[start[64 - length_class(strip_length(m, plane, s))]++] = {int32_t(head), int32_t(s)};
  }
  return tasks;
}

Strip strip_of(const Problem& p, const Task& task) {
  Strip strip;
  strip.b = task.head / p.heads;
  strip.h = task.head % p.heads;
  strip.index = task.strip;
  const int64_t at = p.mask.plane(strip.b, strip.h) * p.mask.strips + task.strip;
  const int64_t begin = p.mask.ptr[at];
  strip.col = p.mask.col + begin;
  strip.slot = p.mask.slot + begin;
  strip.count = p.mask.ptr[at + 1] - begin;
  return strip;
}

int64_t listed_cells(const Mask& m) { return m.ptr[m.batch * m.heads * m.strips]; }

// 1 for each key cell that some strip of a plane lists; all planes one after another.
std::vector<uint8_t> used_cells(const Mask& m) {
  const int64_t planes = m.batch * m.heads;
  std::vector<uint8_t> used(planes * m.cells, 0);
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t begin = m.ptr[plane * m.strips], end = m.ptr[(plane + 1) * m.strips];
    for (int64_t i = begin; i < end; ++i) used[plane * m.cells + m.col[i]] = 1;
  }
  return used;
}

bool is_used(const Problem& p, const std::vector<uint8_t>& used, int64_t b, int64_t kv_head, int64_t cell) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    if (used[p.mask.plane(b, kv_head * group + g) * p.mask.cells + cell]) return true;
    if (p.mask.heads == 1) return false;
  }
  return false;
}

// Values can be read where they lie when they are whole fp32 vectors in consecutive rows. Rows far apart
// share cache sets and TLB entries, so those are copied like keys.
bool values_in_place(const Problem& p) {
  return p.v.element == Element::f32 && p.v.stride[3] == 1 && p.v.stride[2] == p.dim && p.dim % kCell == 0;
}

void run_block_wise(const Problem& p, const Plan& plan, const Workers& workers, bool serial) {
  const Variant& k = kernels();
  const Mask& m = p.mask;
  const int64_t group = p.heads / p.kv_heads, kv_all = p.batch * p.kv_heads;
  const bool pack_values = !values_in_place(p);
  const int64_t panel = p.dim * kCell, rows = p.padded_dim() * kCell;
  const int64_t key_floats = m.cells * panel, value_floats = pack_values ? m.cells * rows : 0;
  const int64_t per_head = (key_floats + value_floats) * int64_t(sizeof(float));
  const int64_t at_once = std::clamp<int64_t>(kPackedBytes / std::max<int64_t>(per_head, 1), 1, kv_all);
  const Scratch scratch(at_once * (key_floats + value_floats));
  float *keys = scratch.data(), *values = keys + at_once * key_floats;
  const std::vector<uint8_t> used = used_cells(m);

  for (int64_t first = 0; first < kv_all; first += at_once) {
    const int64_t last = std::min(first + at_once, kv_all);
    for_each(workers, (last - first) * m.cells, serial, [&](int64_t i) {
      const int64_t head = first + i / m.cells, cell = i % m.cells, b = head / p.kv_heads,
                    kv = head % p.kv_heads;
      if (!is_used(p, used, b, kv, cell)) return;
      k.pack_panel(p, b, kv, cell, keys + i * panel);
      if (pack_values) k.pack_rows(p, p.v, b, kv, cell, values + i * rows);
    });
    const std::vector<Task> tasks = ordered_tasks(p, first * group, last * group);
    for_each(workers, int64_t(tasks.size()), serial, [&](int64_t i) {
      const Strip strip = strip_of(p, tasks[i]);
      const int64_t kv = strip.h / group, head = strip.b * p.kv_heads + kv - first;
      ValueRows v = {values + head * value_floats, p.padded_dim()};
      if (!pack_values)
        v = {static_cast<const float*>(p.v.data) + strip.b * p.v.stride[0] + kv * p.v.stride[1],
             p.v.stride[2]};
      k.block_wise(p, strip, plan.chunk_cells, {keys + head * key_floats}, v);
    });
  }
}

void run_row_wise(const Problem& p, const Workers& workers, bool serial) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t size = p.q.element == Element::bf16 ? 2 : 4;
  const auto rows_of = [size](const Array4& a, int64_t b, int64_t kv) {
    const char* data = static_cast<const char*>(a.data) + (b * a.stride[0] + kv * a.stride[1]) * size;
    return RawRows{data, a.element, a.stride[2]};
  };
  const std::vector<Task> tasks = ordered_tasks(p, 0, p.batch * p.heads);
  for_each(workers, int64_t(tasks.size()), serial, [&](int64_t i) {
    const Strip strip = strip_of(p, tasks[i]);
    const int64_t kv = strip.h / group;
    kernels().row_wise(p, strip, rows_of(p.k, strip.b, kv), rows_of(p.v, strip.b, kv));
  });
}

bool is_out_of_range(const Mask& m, int64_t i) {
  return uint32_t(m.col[i]) >= uint32_t(m.cells) || m.slot[i] < -1 || m.slot[i] >= m.slots;
}

// Whether cell i, the last of its strip, keeps keys that do not exist: row_wise would read them.
bool is_past_the_end(const Mask& m, int64_t i) {
  if (m.tail_keys == kCell || m.col[i] != m.cells - 1) return false;
  if (m.slot[i] < 0) return true;
  uint16_t any = 0;
  for (int r = 0; r < kCell; ++r) any |= uint16_t(m.bits[int64_t(m.slot[i]) * kCell + r]);
  return any >> m.tail_keys != 0;
}

}  // namespace

std::string check_lists(const Mask& m) {
  const int64_t total = m.batch * m.heads * m.strips;
  if (m.ptr[0] != 0) return "ptr[0] is " + std::to_string(m.ptr[0]) + ", it must be 0";
  for (int64_t i = 0; i < total; ++i) {
    if (m.ptr[i + 1] < m.ptr[i]) return "ptr must not decrease, but ptr[" + std::to_string(i + 1) + "] does";
  }
  const int64_t listed = m.ptr[total];
  if (listed > m.listed)
    return "ptr lists " + std::to_string(listed) + " cells, but col and slot hold " +
           std::to_string(m.listed);
  // One pass; the culprit is looked for only when there is one.
  bool bad = false;
  for (int64_t i = 0; i < listed; ++i) bad |= is_out_of_range(m, i) || is_past_the_end(m, i);
  if (!bad) return "";
  int64_t i = 0;
  while (!is_out_of_range(m, i) && !is_past_the_end(m, i)) ++i;
  const std::string at = "[" + std::to_string(i) + "] is ";
  if (uint32_t(m.col[i]) >= uint32_t(m.cells))
    return "col" + at + std::to_string(m.col[i]) + ", allowed are 0 to " + std::to_string(m.cells - 1);
  if (is_out_of_range(m, i))
    return "slot" + at + std::to_string(m.slot[i]) + ", allowed are -1 to " + std::to_string(m.slots - 1);
  return "slot" + at + std::to_string(m.slot[i]) + ", its cell keeps keys past the last one";
}

Plan default_plan(const Problem& p, int64_t cells, int64_t kept) {
  // Nanoseconds of one thread, measured with AVX-512 (NOTES.md); what counts is their ratio.
  const double repeats = double(p.batch * p.heads) / double(p.mask.batch * p.mask.heads);
  const double dim = double(p.dim), rows_per_strip = double(std::min<int64_t>(p.q_len, kCell));
  const double pack = 0.56 * dim * double(p.batch * p.kv_heads * p.kv_len);
  const double block_wise = repeats * double(cells) * (33.0 + 4.9 * dim) + pack;
  const double look = 2.0 * rows_per_strip * double(cells), keys = double(kept) * (0.2 + 0.066 * dim);
  const double row_wise = 60.0 * double(p.batch * p.heads * p.q_len) + repeats * (look + keys);
  Plan plan;
  plan.kernel = row_wise < block_wise ? Kernel::row_wise : Kernel::block_wise;
  return plan;
}

void attention(const Problem& p, const Plan& plan, const Workers& workers) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return;
  const int64_t planes = p.mask.batch * p.mask.heads;
  const double work =
      double(listed_cells(p.mask)) / double(planes) * double(p.batch * p.heads * p.dim) * 512.0;
  const bool serial = work < double(kSerialWork);
  if (plan.kernel == Kernel::row_wise)
    run_row_wise(p, workers, serial);
  else
    run_block_wise(p, plan, workers, serial);
}

void poison(const Problem& p) {
  const int64_t rows = p.batch * p.heads * p.q_len;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  if (p.q.element == Element::bf16)
    std::fill_n(static_cast<uint16_t*>(p.out), rows * p.dim, uint16_t(0x7fc0));
  else
    std::fill_n(static_cast<float*>(p.out), rows * p.dim, nan);
  if (p.lse) std::fill_n(p.lse, rows, nan);
}

const char* instruction_set() { return kernels().name; }

bool use_instruction_set(const char* name) {
  for (const Variant* variant : runnable()) {
    if (std::strcmp(variant->name, name) == 0) {
      chosen().store(variant);
      return true;
    }
  }
  return false;
}

}  // namespace stof::cpu
