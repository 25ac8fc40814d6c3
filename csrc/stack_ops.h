// The ops of a decoder stack as structs of ops.h: what every backend runs, each in its own way. See
// decoder_stack.h.
#pragma once

#include "decoder_stack.h"

namespace fq {

// What passes from op to op. For one token the orders [rows, heads, head_dim] and [batch, heads, t,
// head_dim] are the same, so v_heads may be v, and attended_rows attended.
struct StackArrays {
  void *q, *k, *v;                    // T [rows, heads * head_dim], as the products give them
  void *q_heads, *k_heads, *v_heads;  // T [batch, heads, t, head_dim], after RoPE
  void* q_turned;                     // the queries in the basis of the stored keys
  void *attended, *attended_rows;     // T [batch, heads, t, head_dim]; [rows, heads * head_dim]
  void *gate, *up;                    // T [rows, intermediate]
  uint8_t* codes;                     // [rows, widest], of the input that was quantized last
  float* scale;                       // [rows]
  int32_t* zero;                      // [rows]

  // Sets all pointers; `take` maps a number of bytes to memory.
  template <class Take>
  void place(const DecoderStack& args, Take take) {
    const StackSizes& s = args.sizes;
    const int64_t rows = args.batch * args.t, unit = size_of(args.dtype);
    const int64_t attention = s.heads * s.head_dim, q_bytes = rows * attention * unit;
    const int64_t kv_bytes = rows * s.kv_heads * s.head_dim * unit;
    q = take(q_bytes);
    k = take(kv_bytes);
    v = take(kv_bytes);
    q_heads = take(q_bytes);
    k_heads = take(kv_bytes);
    v_heads = args.t > 1 ? take(kv_bytes) : v;
    q_turned = take(q_bytes);
    attended = take(q_bytes);
    attended_rows = args.t > 1 ? take(q_bytes) : attended;
    gate = take(rows * s.intermediate * unit);
    up = take(rows * s.intermediate * unit);
    place_codes(args, take);
  }

  template <class Take>
  void place_codes(const DecoderStack& args, Take take) {
    const StackSizes& s = args.sizes;
    const int64_t rows = args.batch * args.t, attention = s.heads * s.head_dim;
    int64_t widest = s.hidden > s.intermediate ? s.hidden : s.intermediate;
    widest = widest > attention ? widest : attention;
    scale = static_cast<float*>(take(rows * 4));
    zero = static_cast<int32_t*>(take(rows * 4));
    codes = static_cast<uint8_t*>(take(rows * widest));
  }
};

// nibbles: activation codes lie two in a byte, which only weights that do so too can take.
struct StackOps {
  const DecoderStack& args;
  const StackArrays& arrays;
  bool nibbles;

  int64_t rows() const { return args.batch * args.t; }
  int64_t attention_width() const { return args.sizes.heads * args.sizes.head_dim; }

  KroneckerQuantize attention_in(const StackLayer& layer) const {
    return quantize(layer.attention_in, args.hidden, args.sizes.hidden, &layer.attention_eps);
  }
  KroneckerQuantize attention_out(const StackLayer& layer) const {
    return quantize(layer.attention_out, arrays.attended_rows, attention_width(), nullptr);
  }
  KroneckerQuantize mlp_in(const StackLayer& layer) const {
    return quantize(layer.mlp_in, args.hidden, args.sizes.hidden, &layer.mlp_eps);
  }
  KroneckerQuantize mlp_out(const StackLayer& layer) const {
    KroneckerQuantize op = quantize(layer.mlp_out, arrays.up, args.sizes.intermediate, nullptr);
    op.gate = arrays.gate;
    return op;
  }

  // Of codes that `input` makes.
  GemmInteger multiply(const KroneckerQuantize& input, const StackLinear& linear, void* out) const {
    GemmInteger op{};
    op.a = input.codes;
    op.a_scale = input.scale;
    op.a_zero = input.zero;
    op.w = linear.w;
    op.w_scale = linear.w_scale;
    op.w_colsum = linear.w_colsum;
    op.bias = linear.bias;
    op.bias_dtype = linear.bias_dtype;
    op.out = out;
    op.m = rows();
    op.n = linear.n;
    op.k = nibbles ? (input.k + 1) / 2 * 2 : input.k;
    op.out_dtype = args.dtype;
    return op;
  }
  // The same, added to the residual stream: every element of it is read before it is written.
  GemmInteger add(const KroneckerQuantize& input, const StackLinear& linear) const {
    GemmInteger op = multiply(input, linear, args.hidden);
    op.residual = args.hidden;
    return op;
  }

  // Queries into the basis of the keys; there is something to do if layer.q_transform is given.
  Kronecker turn_queries(const StackLayer& layer) const {
    Kronecker op{};
    op.x = arrays.q_heads;
    op.out = arrays.q_turned;
    op.transform.right = layer.q_transform;
    op.transform.right_dtype = layer.q_transform_dtype;
    op.transform.n1 = 1;
    op.transform.n2 = op.k = args.sizes.head_dim;
    op.rows = rows() * args.sizes.heads;
    op.dtype = op.out_dtype = args.dtype;
    return op;
  }

  KvQuantizeAppend append_keys(const StackLayer& layer, const StackCache& cache) const {
    KvQuantizeAppend op = append(arrays.k_heads, layer.k_clip, cache);
    op.transform = layer.k_transform;
    op.transform_dtype = layer.k_transform_dtype;
    op.codes = cache.k_codes;
    op.scale = cache.k_scale;
    op.zero = cache.k_zero;
    op.bits = args.sizes.k_bits;
    return op;
  }
  KvQuantizeAppend append_values(const StackLayer& layer, const StackCache& cache) const {
    KvQuantizeAppend op = append(arrays.v_heads, layer.v_clip, cache);
    op.codes = cache.v_codes;
    op.scale = cache.v_scale;
    op.zero = cache.v_zero;
    op.bits = args.sizes.v_bits;
    return op;
  }

  AttentionDecode attend(const StackLayer& layer, const StackCache& cache) const {
    AttentionDecode op{};
    op.q = layer.q_transform ? arrays.q_turned : arrays.q_heads;
    op.k_codes = cache.k_codes;
    op.k_scale = cache.k_scale;
    op.k_zero = cache.k_zero;
    op.v_codes = cache.v_codes;
    op.v_scale = cache.v_scale;
    op.v_zero = cache.v_zero;
    op.mask = args.mask;
    op.mask_kind = args.mask_kind;
    op.mask_dtype = args.mask_dtype;
    for (int i = 0; i < 4; ++i) op.mask_strides[i] = args.mask_strides[i];
    op.out = arrays.attended;
    op.batch = args.batch;
    op.heads = args.sizes.heads;
    op.kv_heads = args.sizes.kv_heads;
    op.tq = args.t;
    op.head_dim = args.sizes.head_dim;
    op.capacity = cache.capacity;
    op.length = args.past + args.t;
    op.k_bits = args.sizes.k_bits;
    op.v_bits = args.sizes.v_bits;
    op.scaling = args.sizes.scaling;
    op.dtype = args.dtype;
    op.lengths = args.lengths;
    op.blocks = args.batch;
    return op;
  }

 private:
  KroneckerQuantize quantize(const StackInput& input, const void* x, int64_t width,
                             const float* eps) const {
    KroneckerQuantize op{};
    op.x = x;
    op.clip = input.clip;
    op.codes = arrays.codes;
    op.scale = arrays.scale;
    op.zero = args.sizes.symmetric ? nullptr : arrays.zero;
    op.transform = input.transform;
    op.rows = rows();
    op.k = width;
    op.rms = eps != nullptr;
    op.rms_eps = eps ? *eps : 0.0f;
    op.dtype = args.dtype;
    const Layout layout = nibbles ? Layout::kPacked : Layout::kBytes;
    op.grid = {args.sizes.a_bits, args.sizes.symmetric, false, layout};
    return op;
  }

  KvQuantizeAppend append(const void* x, const float* clip, const StackCache& cache) const {
    KvQuantizeAppend op{};
    op.x = x;
    op.clip = clip;
    op.batch_heads = args.batch * args.sizes.kv_heads;
    op.t = args.t;
    op.capacity = cache.capacity;
    op.start = args.slots ? 0 : args.past;
    op.head_dim = args.sizes.head_dim;
    op.dtype = args.dtype;
    op.slots = args.slots;  // each sequence is one block
    op.kv_heads = args.sizes.kv_heads;
    op.blocks = args.batch;
    return op;
  }
};

}  // namespace fq
