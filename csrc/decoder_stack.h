// A whole stack of quantized decoder layers as one op: its struct, and how each device runs it.
//
// A layer is:  norm, transform, codes -> q, k, v -> RoPE, K and V into the cache, attention ->
// transform, codes -> o + residual -> norm, transform, codes -> gate, up -> SiLU(gate) * up,
// transform, codes -> down + residual.  Every arrow is one of the ops of ops.h, called on the same
// numbers as when they are called one by one, so the answer is the same, bit for bit.
#pragma once

#include "ops.h"

namespace fq {

// How the input of linears is made: what KroneckerQuantize needs of it.
struct StackInput {
  Transform transform;
  const float* clip;  // optional
};

// One linear: what GemmInteger needs of it.
struct StackLinear {
  const uint8_t* w;
  const float* w_scale;
  const int32_t* w_colsum;  // asymmetric activations only
  const void* bias;         // optional
  int64_t n;
  Dtype bias_dtype;
};

struct StackLayer {
  StackInput attention_in, attention_out, mlp_in, mlp_out;
  StackLinear q, k, v, o, gate, up, down;
  const void *k_transform, *q_transform;  // [head_dim, head_dim], optional
  Dtype k_transform_dtype, q_transform_dtype;
  const float *k_clip, *v_clip;  // optional
  float attention_eps, mlp_eps;  // of the norms
};

// The cache of one layer: as in KvQuantizeAppend.
struct StackCache {
  uint8_t* k_codes;
  float* k_scale;
  uint8_t* k_zero;
  uint8_t* v_codes;
  float* v_scale;
  uint8_t* v_zero;
  int64_t capacity;
};

struct StackSizes {
  int64_t hidden, intermediate, heads, kv_heads, head_dim;
  int32_t a_bits, w_bits;  // weights lie in nibbles up to 4 bits, else in bytes
  int32_t k_bits, v_bits;
  bool symmetric;  // activations
  float scaling;   // of attention scores
};

// hidden -> hidden, the output of the last layer. Queries and keys are turned as transformers does:
//   round_T(round_T(x cos) + round_T(rotate_half(x) sin))
struct DecoderStack {
  const StackLayer* layers;  // [count]
  const StackCache* caches;  // [count]
  int64_t count;
  StackSizes sizes;
  void* hidden;           // T [batch, t, hidden], in and out
  const void *cos, *sin;  // T [cos_batch, t, head_dim], cos_batch 1 or batch
  const void* mask;       // as in AttentionDecode, for length = past + t
  int64_t mask_strides[4];
  Mask mask_kind;
  Dtype mask_dtype;
  int64_t batch, t, past, cos_batch;
  Dtype dtype;
  // For cuda:: only, both or none, so that a CUDA graph serves all lengths: where each token goes,
  // slots[b, i] = b * capacity + position, or -1 for nowhere; and how many positions of each
  // sequence are in use then, of which past + t are as many as there may be. Both on the device.
  const int64_t* slots = nullptr;    // [batch, t]
  const int32_t* lengths = nullptr;  // [batch]
};

namespace cpu {

// How many threads are worth starting, at most `available`.
int64_t decoder_stack_threads(const DecoderStack& args, int64_t available);

// Bytes of memory, 64-byte aligned, that `threads` threads need between them.
int64_t decoder_stack_workspace(const DecoderStack& args, int64_t threads);

// Before any thread starts: makes the workspace ready.
void decoder_stack_begin(const DecoderStack& args, int64_t threads, void* workspace);

// One thread's part, `thread` in 0..threads-1; returns when the whole stack is done. Threads share
// the work as they come: those that come late, or not at all, are not waited for. False if another
// thread has failed. Throws std::bad_alloc.
bool decoder_stack(const DecoderStack& args, int64_t thread, int64_t threads, void* workspace);

}  // namespace cpu

namespace cuda {

// As in ops.h. All caches have the same capacity if slots is given.
int decoder_stack(const DecoderStack& args, void* workspace, void* stream);
int64_t decoder_stack_workspace(const DecoderStack& args);

}  // namespace cuda
}  // namespace fq
