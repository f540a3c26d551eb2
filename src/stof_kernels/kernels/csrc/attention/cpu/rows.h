// Rows in and out: what both kernels do alike.
#pragma once

#include "variant.h"
#include "vec.h"

namespace stof::cpu::STOF_ISA {

template <typename T>
STOF_INLINE const T* row_base(const Array4& a, int64_t b, int64_t head, int64_t row) {
  return static_cast<const T*>(a.data) + b * a.stride[0] + head * a.stride[1] + row * a.stride[2];
}

// The bias of one query row: element j is at data + j * step.
struct BiasRow {
  const void* data = nullptr;
  Element element = Element::f32;
  int64_t step = 0;

  float at(int64_t key) const {
    return element == Element::bf16 ? widen(static_cast<const uint16_t*>(data)[key * step])
                                    : static_cast<const float*>(data)[key * step];
  }
  Vec vec(int64_t key) const {
    return element == Element::bf16 ? load(static_cast<const uint16_t*>(data) + key)
                                    : load(static_cast<const float*>(data) + key);
  }
};

STOF_INLINE BiasRow bias_row(const Problem& p, int64_t b, int64_t h, int64_t query) {
  BiasRow row;
  row.element = p.bias.element;
  row.step = p.bias.stride[3];
  const int64_t offset = b * p.bias.stride[0] + h * p.bias.stride[1] + query * p.bias.stride[2];
  row.data = static_cast<const char*>(p.bias.data) + offset * (p.bias.element == Element::bf16 ? 2 : 4);
  return row;
}

// out = o / l and lse = m + ln(l); nothing attended (l = 0) gives zeros and -inf.
STOF_INLINE void finish_row(const Problem& p, int64_t b, int64_t h, int64_t query, const float* o, float m,
                            float l) {
  const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
  const int64_t at = ((b * p.q_len + query) * p.heads + h) * p.dim;
  if (p.q.element == Element::bf16) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + at;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = narrow(o[d] * inverse);
  } else {
    float* out = static_cast<float*>(p.out) + at;
    for (int64_t d = 0; d < p.dim; ++d) out[d] = o[d] * inverse;
  }
  if (p.lse) p.lse[(b * p.heads + h) * p.q_len + query] = l == 0.0f ? -kInf : m + __builtin_logf(l);
}

}  // namespace stof::cpu::STOF_ISA
