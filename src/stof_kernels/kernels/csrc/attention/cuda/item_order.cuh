// In which order work items of all copies of a mask are taken.
#pragma once

#include <cuda_runtime_api.h>

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

}  // namespace stof::cuda
