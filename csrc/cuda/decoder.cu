// A whole stack of decoder layers: the launches of every op, one after another, from one call. See
// ../decoder_stack.h. Host code only: no number is computed here.
//
// Nothing waits for the device and nothing is allocated between the launches, so the call can be
// captured into a CUDA graph.
//
// Weights of linears with the same input are one product where they lie side by side in memory, as
// flatquant_cuda/decoder.py places them: q | k | v, and gate | up. A layer is then, for one token:
//
//   codes, q|k|v, RoPE, [queries to the keys' basis,] append, attention, codes, o, codes, gate|up,
//   codes, down
//
// with one launch each, and a second for attention over several chunks.
#include "../stack_ops.h"

#include <initializer_list>

#include "gpu.h"
#include "heads.h"
#include "kv_cache.cuh"

namespace fq::cuda {
namespace {

constexpr int64_t kAlignment = 128;  // bytes, of every array in the workspace

// 4-bit activations lie two in a byte where there are products of them
// (flatquant_cuda/library.py has the same rule: activation_layout).
bool nibbles(const StackSizes& sizes) {
  return sizes.a_bits <= 4 && sizes.w_bits <= 4 && current_gpu().arch != 90;
}

// Whether the rows of `second` come right after those of `first`, which has k columns.
bool side_by_side(const StackLinear& first, const StackLinear& second, int64_t k, int32_t w_bits) {
  const int64_t row = w_bits > 4 ? k : nibble_bytes(k);
  const bool bias = !first.bias && !second.bias;
  const bool biases =
      first.bias && second.bias && first.bias_dtype == second.bias_dtype &&
      static_cast<const uint8_t*>(first.bias) + first.n * size_of(first.bias_dtype) == second.bias;
  return first.w + first.n * row == second.w && first.w_scale + first.n == second.w_scale &&
         (!first.w_colsum || first.w_colsum + first.n == second.w_colsum) && (bias || biases);
}

// What is one product in every layer.
struct Joined {
  bool qkv = true, gate_up = true;

  explicit Joined(const DecoderStack& args) {
    const StackSizes& s = args.sizes;
    for (int64_t i = 0; i < args.count; ++i) {
      const StackLayer& layer = args.layers[i];
      qkv = qkv && side_by_side(layer.q, layer.k, s.hidden, s.w_bits) &&
            side_by_side(layer.k, layer.v, s.hidden, s.w_bits);
      gate_up = gate_up && side_by_side(layer.gate, layer.up, s.hidden, s.w_bits);
    }
  }
};

// What lies in the workspace; `scratch`, the last, is that of one op at a time.
struct Memory {
  Joined joined;
  StackArrays arrays;
  int64_t q_stride, kv_stride, mlp_stride;  // of the products' outputs: elements from row to row
  void* scratch;
  int64_t bytes = 0;

  Memory(const DecoderStack& args, int64_t scratch_bytes, void* workspace) : joined(args) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(workspace);
    const auto take = [&](int64_t size) {
      const uintptr_t found = base + static_cast<uintptr_t>(bytes);
      bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
      return reinterpret_cast<void*>(found);
    };
    arrays.place(args, take);
    const StackSizes& s = args.sizes;
    const int64_t rows = args.batch * args.t, unit = size_of(args.dtype);
    q_stride = s.heads * s.head_dim;
    kv_stride = s.kv_heads * s.head_dim;
    mlp_stride = s.intermediate;
    // Neighbours have their memory one after another (StackArrays::place), so a product that gives
    // all of them has room there.
    if (joined.qkv) {
      arrays.k = static_cast<uint8_t*>(arrays.q) + q_stride * unit;
      arrays.v = static_cast<uint8_t*>(arrays.k) + kv_stride * unit;
      if (args.t == 1) arrays.v_heads = rows == 1 ? arrays.v : take(rows * kv_stride * unit);
      q_stride = kv_stride = q_stride + 2 * kv_stride;
    }
    if (joined.gate_up) {
      arrays.up = static_cast<uint8_t*>(arrays.gate) + mlp_stride * unit;
      mlp_stride *= 2;
    }
    scratch = take(scratch_bytes);
  }
};

// The launches of a layer. After an error nothing more is launched.
class Walk {
 public:
  Walk(const DecoderStack& args, const Memory& memory, void* stream)
      : args_(args),
        memory_(memory),
        arrays_(memory.arrays),
        ops_{args, memory.arrays, nibbles(args.sizes)},
        stream_(stream) {}

  int error() const { return error_; }

  void layer(const StackLayer& layer, const StackCache& cache) {
    const KroneckerQuantize attention_in = ops_.attention_in(layer), mlp_in = ops_.mlp_in(layer);
    KroneckerQuantize mlp_out = ops_.mlp_out(layer);
    mlp_out.stride = memory_.mlp_stride;
    run(attention_in, memory_.joined.qkv, {&layer.q, &layer.k, &layer.v},
        {arrays_.q, arrays_.k, arrays_.v});
    place(layer, cache);
    attend(layer, cache);
    add(ops_.attention_out(layer), layer.o);
    run(mlp_in, memory_.joined.gate_up, {&layer.gate, &layer.up}, {arrays_.gate, arrays_.up});
    add(mlp_out, layer.down);
  }

 private:
  template <class Op, class Args>
  void launch(Op op, const Args& args) {
    if (error_ == 0) error_ = op(args, memory_.scratch, stream_);
  }

  void multiply(const GemmInteger& product) {
    const bool bytes = args_.sizes.w_bits > 4;
    launch(bytes ? &gemm_w8a8 : ops_.nibbles ? &gemm_w4a4 : &gemm_w4a8, product);
  }

  // Codes, and the products of them: one if `joined`, into the first output.
  void run(const KroneckerQuantize& input, bool joined,
           std::initializer_list<const StackLinear*> linears,
           std::initializer_list<void*> outputs) {
    launch(&kronecker_quantize, input);
    if (joined) {
      StackLinear all = **linears.begin();
      all.n = 0;
      for (const StackLinear* linear : linears) all.n += linear->n;
      return multiply(ops_.multiply(input, all, *outputs.begin()));
    }
    void* const* out = outputs.begin();
    for (const StackLinear* linear : linears) multiply(ops_.multiply(input, *linear, *out++));
  }

  // Codes, and the product of them onto the residual stream.
  void add(const KroneckerQuantize& input, const StackLinear& linear) {
    launch(&kronecker_quantize, input);
    multiply(ops_.add(input, linear));
  }

  // RoPE; queries into the basis of the keys; keys and values into the cache.
  void place(const StackLayer& layer, const StackCache& cache) {
    const StackSizes& s = args_.sizes;
    const TurnHeads heads{
        arrays_.q, arrays_.k,       arrays_.v,       memory_.q_stride, memory_.kv_stride, args_.cos,
        args_.sin, arrays_.q_heads, arrays_.k_heads, arrays_.v_heads,  args_.batch,       args_.t,
        s.heads,   s.kv_heads,      s.head_dim,      args_.cos_batch,  args_.dtype};
    if (error_ == 0) error_ = turn_heads(heads, stream_);
    if (layer.q_transform) launch(&kronecker, ops_.turn_queries(layer));
    const KvQuantizeAppend keys = ops_.append_keys(layer, cache);
    const KvQuantizeAppend values = ops_.append_values(layer, cache);
    if (error_ == 0) error_ = append_both(keys, values, stream_);
  }

  void attend(const StackLayer& layer, const StackCache& cache) {
    launch(&attention_decode, ops_.attend(layer, cache));
    if (args_.t == 1 || error_ != 0) return;
    error_ = gather_heads({arrays_.attended, arrays_.attended_rows, args_.batch, args_.t,
                           args_.sizes.heads, args_.sizes.head_dim, args_.dtype},
                          stream_);
  }

  const DecoderStack& args_;
  const Memory& memory_;
  const StackArrays& arrays_;
  const StackOps ops_;
  void* const stream_;
  int error_ = 0;
};

// The most that an op needs: only attention needs any, because the only products of nibbles are
// those of cards that have them; the layers are alike.
int64_t scratch_bytes(const DecoderStack& args) {
  const Memory memory(args, 0, nullptr);
  const StackOps ops{args, memory.arrays, nibbles(args.sizes)};
  int64_t most = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t bytes = attention_decode_workspace(ops.attend(args.layers[i], args.caches[i]));
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace

int64_t decoder_stack_workspace(const DecoderStack& args) {
  return Memory(args, scratch_bytes(args), nullptr).bytes;
}

int decoder_stack(const DecoderStack& args, void* workspace, void* stream) {
  const Memory memory(args, 0, workspace);  // the scratch comes last: its size moves nothing
  Walk walk(args, memory, stream);
  for (int64_t i = 0; i < args.count; ++i) walk.layer(args.layers[i], args.caches[i]);
  return walk.error();
}

}  // namespace fq::cuda
