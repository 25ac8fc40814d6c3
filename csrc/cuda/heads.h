// Queries, keys and values between the order in which products give them, token by token, and the
// order in which attention takes them, head by head; RoPE on the way. Pure C++, no CUDA header.
#pragma once

#include "../ops.h"

namespace fq::cuda {

// Every query and key is turned as transformers does, term by term rounded:
//   round_T(round_T(x cos) + round_T(rotate_half(x) sin)),  rotate_half([a, b]) = [-b, a]
// Values only change places, unless v_out is v, where they already are.
struct TurnHeads {
  const void *q, *k, *v;        // T [batch, t, heads or kv_heads, head_dim]
  int64_t q_stride, kv_stride;  // elements from a token to the next
  const void *cos, *sin;        // T [cos_batch, t, head_dim], cos_batch 1 or batch
  void *q_out, *k_out, *v_out;  // T [batch, heads or kv_heads, t, head_dim]
  int64_t batch, t, heads, kv_heads, head_dim, cos_batch;  // head_dim even
  Dtype dtype;
};

// x T [batch, heads, t, head_dim] -> out T [batch, t, heads, head_dim]
struct GatherHeads {
  const void* x;
  void* out;
  int64_t batch, t, heads, head_dim;
  Dtype dtype;
};

// A cudaError_t each.
int turn_heads(const TurnHeads& args, void* stream);
int gather_heads(const GatherHeads& args, void* stream);

}  // namespace fq::cuda
