// In which order work items of all copies of a mask are taken.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace stof::cuda {

struct Assignment {
  int item, copy;
};

// Of blocks that stay and take one unit (an item of a copy) after the other. Copies go in groups whose keys fit in L2, and in a
// group the longest items of all its copies come first. Items that are far longer than the others lead: they are taken for all
// copies, group by group, before the rest is. In the last group they would start late and run on when all else has ended.
struct StayingOrder {
  int items, leading;  // of a copy, longest first; how many of them lead
  int copies, group;   // of a group; the last one may be smaller

  __device__ __forceinline__ Assignment at(int unit) const {
    const bool leads = unit < leading * copies;
    const int first = leads ? 0 : leading, count = leads ? leading : items - leading;
    const int index = leads ? unit : unit - leading * copies;
    const int first_copy = index / (count * group) * group, side = group < copies - first_copy ? group : copies - first_copy;
    const int rest = index - first_copy * count, item = rest / side;
    return {first + item, first_copy + rest - item * side};
  }
};

// Copies of a group, for `sets` of warpgroups that take one item after the other: 8 MB of keys and values, for few copies are
// worked on at a time and their keys should stay in one part of L2, but two rounds of items at least. The last group has two
// rounds as well, or it would end with its longest items on few multiprocessors.
inline int64_t copies_of_group(int64_t copy_bytes, int64_t items, int64_t copies, int64_t sets) {
  constexpr int64_t kCacheBytes = 8 << 20;
  const int64_t busy = (2 * sets + items - 1) / items;
  int64_t group = kCacheBytes / (copy_bytes + 1);
  if (group < busy) group = busy;
  while (group < copies && copies % group != 0 && copies % group < busy) ++group;
  return group < copies ? group : copies;
}

}  // namespace stof::cuda
