// Rotary position embedding of queries or keys, as transformers computes it, term by term rounded:
//   round_T(round_T(x cos) + round_T(rotate_half(x) sin)),  rotate_half([a, b]) = [-b, a]
#pragma once

#include "../ops.h"

namespace fq::cpu {

struct Rope {
  const void* x;          // T [batch, t, heads, head_dim]
  const void *cos, *sin;  // T [cos_batch, t, head_dim], cos_batch 1 or batch
  void* out;              // T [batch, heads, t, head_dim]
  int64_t t, heads, head_dim, cos_batch;
  Dtype dtype;
};

// begin, end: rows of out. work: head_dim floats.
void rope(const Rope& args, int64_t begin, int64_t end);
void rope_avx2(const Rope& args, int64_t begin, int64_t end, float* work);
void rope_avx512(const Rope& args, int64_t begin, int64_t end, float* work);

}  // namespace fq::cpu
