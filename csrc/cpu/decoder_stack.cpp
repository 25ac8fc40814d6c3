// A whole stack of decoder layers in one parallel region. See ../decoder_stack.h.
//
// Every thread walks through the steps of all layers (steps.h). Six steps a layer for one row,
// whose codes every thread makes for itself: that takes less time than to wait for another that
// does. Ten for more rows. Which thread does what changes no bit.
#include "../decoder_stack.h"

#include <initializer_list>
#include <new>

#include "rope.h"
#include "steps.h"

namespace fq::cpu {
namespace {

constexpr int64_t kSteps = 10;  // of a layer, at most
constexpr int64_t kPieces = 3;  // of a step, per thread
constexpr int64_t kFewRows = 32;  // more are prepared for a product once a piece: one a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct alignas(kLine) Shared {
  std::atomic<bool> failed;
};

struct Codes {
  uint8_t* codes;
  float* scale;
  int32_t* zero;
};

// What lies in the workspace.
struct Arrays {
  Shared* shared;
  Step* steps;                        // [count, kSteps]
  void *q, *k, *v;                    // T [rows, heads * head_dim], as the products give them
  void *q_heads, *k_heads, *v_heads;  // T [batch, heads, t, head_dim], after RoPE
  void* q_turned;                     // the queries in the basis of the stored keys
  void *attended, *attended_rows;     // T [batch, heads, t, head_dim]; [rows, heads * head_dim]
  void *gate, *up;                    // T [rows, intermediate]
  Codes codes;                        // of all rows; for one row, of thread 0
  int64_t thread_bytes;               // from one thread's codes to the next's
  int64_t bytes = 0;                  // of everything

  Arrays(const DecoderStack& args, int64_t threads, void* workspace) {
    const StackSizes& s = args.sizes;
    const int64_t rows = args.batch * args.t, unit = size_of(args.dtype);
    const int64_t attention = s.heads * s.head_dim, q_bytes = rows * attention * unit;
    const int64_t kv_bytes = rows * s.kv_heads * s.head_dim * unit;
    int64_t widest = s.hidden > s.intermediate ? s.hidden : s.intermediate;
    widest = widest > attention ? widest : attention;

    const uintptr_t base = reinterpret_cast<uintptr_t>(workspace);
    const auto take = [&](int64_t size) {
      const uintptr_t found = base + static_cast<uintptr_t>(bytes);
      bytes += ceil_div(size, kLine) * kLine;
      return reinterpret_cast<uint8_t*>(found);
    };
    shared = reinterpret_cast<Shared*>(take(sizeof(Shared)));
    steps = reinterpret_cast<Step*>(take(args.count * kSteps * int64_t{sizeof(Step)}));
    q = take(q_bytes);
    k = take(kv_bytes);
    v = take(kv_bytes);
    q_heads = take(q_bytes);
    k_heads = take(kv_bytes);
    v_heads = take(kv_bytes);
    q_turned = take(q_bytes);
    attended = take(q_bytes);
    attended_rows = take(q_bytes);
    gate = take(rows * s.intermediate * unit);
    up = take(rows * s.intermediate * unit);
    const int64_t before = bytes;
    codes.scale = reinterpret_cast<float*>(take(rows * 4));
    codes.zero = reinterpret_cast<int32_t*>(take(rows * 4));
    codes.codes = take(rows * widest);
    thread_bytes = rows == 1 ? bytes - before : 0;
    bytes += thread_bytes * (threads - 1);
  }

  Codes codes_of(int64_t thread) const {
    const int64_t offset = thread * thread_bytes;
    return {codes.codes + offset, codes.scale + offset / 4, codes.zero + offset / 4};
  }
};

struct Product {
  const StackLinear* linear;
  void* out;
};

// One thread's walk.
class Walk {
 public:
  Walk(const DecoderStack& args, const Arrays& arrays, int64_t thread, int64_t threads)
      : args_(args),
        sizes_(args.sizes),
        arrays_(arrays),
        steps_(arrays.steps, arrays.shared->failed),
        threads_(threads),
        rows_(args.batch * args.t),
        codes_(arrays.codes_of(thread)) {}

  void layer(const StackLayer& layer, const StackCache& cache) {
    const int64_t attention = sizes_.heads * sizes_.head_dim;
    multiply(quantizer(layer.attention_in, args_.hidden, sizes_.hidden, &layer.attention_eps),
             {{&layer.q, arrays_.q}, {&layer.k, arrays_.k}, {&layer.v, arrays_.v}}, false);
    place(layer, cache);
    attend(layer, cache);
    multiply(quantizer(layer.attention_out, arrays_.attended_rows, attention, nullptr),
             {{&layer.o, args_.hidden}}, true);
    multiply(quantizer(layer.mlp_in, args_.hidden, sizes_.hidden, &layer.mlp_eps),
             {{&layer.gate, arrays_.gate}, {&layer.up, arrays_.up}}, false);
    KroneckerQuantize gated = quantizer(layer.mlp_out, arrays_.up, sizes_.intermediate, nullptr);
    gated.gate = arrays_.gate;
    multiply(gated, {{&layer.down, args_.hidden}}, true);
  }

 private:
  // Units to take at a time, of which `group` share some preparation.
  int64_t piece(int64_t units, int64_t group = 1) const {
    const int64_t most = ceil_div(units, threads_), several = ceil_div(units, threads_ * kPieces);
    return group < several ? ceil_div(several, group) * group : group > 1 ? most : several;
  }

  KroneckerQuantize quantizer(const StackInput& input, const void* x, int64_t width,
                              const float* eps) const {
    KroneckerQuantize op{};
    op.x = x;
    op.clip = input.clip;
    op.codes = codes_.codes;
    op.scale = codes_.scale;
    op.zero = sizes_.symmetric ? nullptr : codes_.zero;
    op.transform = input.transform;
    op.rows = rows_;
    op.k = width;
    op.rms = eps != nullptr;
    op.rms_eps = eps ? *eps : 0.0f;
    op.dtype = args_.dtype;
    const Layout layout = sizes_.w_bits > 4 ? Layout::kBytes : Layout::kPacked;
    op.grid = {sizes_.a_bits, sizes_.symmetric, false, layout};
    return op;
  }

  // Up to three products of the same codes, as one list of tiles. residual: out is added to; every
  // element of it is read before it is written.
  void multiply(const KroneckerQuantize& input, std::initializer_list<Product> products,
                bool residual) {
    bool coded = rows_ > 1;
    if (coded)
      steps_.share(rows_, piece(rows_),
                   [&](int64_t begin, int64_t end) { kronecker_quantize(input, begin, end); });

    const bool nibbles = sizes_.a_bits <= 4 && sizes_.w_bits <= 4;
    const auto gemm = sizes_.w_bits > 4 ? &gemm_w8a8 : nibbles ? &gemm_w4a4 : &gemm_w4a8;
    GemmInteger ops[3] = {};
    int64_t tiles[3] = {};
    int count = 0;
    for (const Product& product : products) {
      GemmInteger& op = ops[count];
      op.a = input.codes;
      op.a_scale = input.scale;
      op.a_zero = input.zero;
      op.w = product.linear->w;
      op.w_scale = product.linear->w_scale;
      op.w_colsum = product.linear->w_colsum;
      op.bias = product.linear->bias;
      op.bias_dtype = product.linear->bias_dtype;
      op.out = product.out;
      op.residual = residual ? product.out : nullptr;
      op.m = rows_;
      op.n = product.linear->n;
      op.k = nibbles ? ceil_div(input.k, 2) * 2 : input.k;
      op.out_dtype = args_.dtype;
      tiles[count++] = gemm_tiles(op);
    }
    const int64_t all = tiles[0] + tiles[1] + tiles[2];
    const int64_t size = rows_ > kFewRows ? ceil_div(all, threads_) : piece(all);
    steps_.share(all, size, [&](int64_t begin, int64_t end) {
      if (!coded) kronecker_quantize(input, 0, rows_);
      coded = true;
      for (int i = 0; i < count; ++i) {
        const int64_t last = end < tiles[i] ? end : tiles[i];
        if (begin < last) gemm(ops[i], begin, last);
        begin = begin < tiles[i] ? 0 : begin - tiles[i];
        end -= tiles[i];
        if (end <= 0) break;
      }
    });
  }

  // First element of row `row` of [batch, heads, t, head_dim], in [batch, t, heads, head_dim].
  int64_t by_token(int64_t row, int64_t heads) const {
    const int64_t i = row % args_.t, h = row / args_.t % heads, b = row / args_.t / heads;
    return ((b * args_.t + i) * heads + h) * sizes_.head_dim;
  }

  void rotate(const void* x, int64_t heads, void* out, int64_t begin, int64_t end) const {
    rope({x, args_.cos, args_.sin, out, args_.t, heads, sizes_.head_dim, args_.cos_batch,
          args_.dtype},
         begin, end);
  }

  // Copies head_dim elements from element `from` of x to element `to` of out.
  void copy(const void* x, int64_t from, void* out, int64_t to) const {
    const int64_t unit = size_of(args_.dtype);
    __builtin_memcpy(static_cast<uint8_t*>(out) + to * unit,
                     static_cast<const uint8_t*>(x) + from * unit,
                     static_cast<std::size_t>(sizes_.head_dim * unit));
  }

  // RoPE; queries into the basis of the keys; keys and values into the cache. A unit is a row of
  // the queries, then of the cache.
  void place(const StackLayer& layer, const StackCache& cache) {
    const int64_t queries = rows_ * sizes_.heads, all = queries + rows_ * sizes_.kv_heads;
    steps_.share(all, ceil_div(all, threads_), [&](int64_t begin, int64_t end) {
      if (begin < queries) place_queries(layer, begin, end < queries ? end : queries);
      if (end > queries)
        place_keys(layer, cache, begin < queries ? 0 : begin - queries, end - queries);
    });
  }

  void place_queries(const StackLayer& layer, int64_t begin, int64_t end) const {
    rotate(arrays_.q, sizes_.heads, arrays_.q_heads, begin, end);
    if (layer.q_transform == nullptr) return;
    Kronecker op{};
    op.x = arrays_.q_heads;
    op.out = arrays_.q_turned;
    op.transform.right = layer.q_transform;
    op.transform.right_dtype = layer.q_transform_dtype;
    op.transform.n1 = 1;
    op.transform.n2 = op.k = sizes_.head_dim;
    op.rows = rows_ * sizes_.heads;
    op.dtype = op.out_dtype = args_.dtype;
    kronecker(op, begin, end);
  }

  void place_keys(const StackLayer& layer, const StackCache& cache, int64_t begin,
                  int64_t end) const {
    const int64_t d = sizes_.head_dim, heads = sizes_.kv_heads;
    rotate(arrays_.k, heads, arrays_.k_heads, begin, end);
    for (int64_t row = begin; row < end && args_.t > 1; ++row)
      copy(arrays_.v, by_token(row, heads), arrays_.v_heads, row * d);
    KvQuantizeAppend op{};
    op.x = arrays_.k_heads;
    op.transform = layer.k_transform;
    op.transform_dtype = layer.k_transform_dtype;
    op.clip = layer.k_clip;
    op.codes = cache.k_codes;
    op.scale = cache.k_scale;
    op.zero = cache.k_zero;
    op.batch_heads = args_.batch * heads;
    op.t = args_.t;
    op.capacity = cache.capacity;
    op.start = args_.past;
    op.head_dim = d;
    op.bits = sizes_.k_bits;
    op.dtype = args_.dtype;
    kv_quantize_append(op, begin, end);
    op.x = args_.t > 1 ? arrays_.v_heads : arrays_.v;  // for one token the two orders are one
    op.transform = nullptr;
    op.clip = layer.v_clip;
    op.codes = cache.v_codes;
    op.scale = cache.v_scale;
    op.zero = cache.v_zero;
    op.bits = sizes_.v_bits;
    kv_quantize_append(op, begin, end);
  }

  // Attention; its rows go back to the order of the tokens.
  void attend(const StackLayer& layer, const StackCache& cache) {
    AttentionDecode op{};
    op.q = layer.q_transform ? arrays_.q_turned : arrays_.q_heads;
    op.k_codes = cache.k_codes;
    op.k_scale = cache.k_scale;
    op.k_zero = cache.k_zero;
    op.v_codes = cache.v_codes;
    op.v_scale = cache.v_scale;
    op.v_zero = cache.v_zero;
    op.mask = args_.mask;
    op.mask_kind = args_.mask_kind;
    op.mask_dtype = args_.mask_dtype;
    for (int i = 0; i < 4; ++i) op.mask_strides[i] = args_.mask_strides[i];
    op.out = args_.t > 1 ? arrays_.attended : arrays_.attended_rows;
    op.batch = args_.batch;
    op.heads = sizes_.heads;
    op.kv_heads = sizes_.kv_heads;
    op.tq = args_.t;
    op.head_dim = sizes_.head_dim;
    op.capacity = cache.capacity;
    op.length = args_.past + args_.t;
    op.k_bits = sizes_.k_bits;
    op.v_bits = sizes_.v_bits;
    op.scaling = sizes_.scaling;
    op.dtype = args_.dtype;
    const int64_t queries = rows_ * sizes_.heads;
    const int64_t sharing = sizes_.heads / sizes_.kv_heads * args_.t;  // of one cache head
    steps_.share(queries, piece(queries, sharing), [&](int64_t begin, int64_t end) {
      attention_decode(op, begin, end);
      for (int64_t row = begin; row < end && args_.t > 1; ++row)
        copy(arrays_.attended, row * sizes_.head_dim, arrays_.attended_rows,
             by_token(row, sizes_.heads));
    });
  }

  const DecoderStack& args_;
  const StackSizes& sizes_;
  const Arrays& arrays_;
  Steps steps_;
  const int64_t threads_, rows_;
  const Codes codes_;
};

}  // namespace

int64_t decoder_stack_threads(const DecoderStack& args, int64_t available) {
  constexpr int64_t kWorthAThread = 8192;  // bytes of weights that a step reads
  const StackSizes& s = args.sizes;
  const int64_t across = (2 * s.heads + 2 * s.kv_heads) * s.head_dim + 3 * s.intermediate;
  const int64_t bytes = across * s.hidden / (s.w_bits > 4 ? 1 : 2);
  const int64_t rows = args.batch * args.t;
  const int64_t wanted = ceil_div(bytes * ceil_div(rows, 8), 6 * kWorthAThread);
  return wanted < available ? wanted : available;
}

int64_t decoder_stack_workspace(const DecoderStack& args, int64_t threads) {
  return Arrays(args, threads, nullptr).bytes;
}

void decoder_stack_begin(const DecoderStack& args, int64_t threads, void* workspace) {
  const Arrays arrays(args, threads, workspace);
  new (arrays.shared) Shared();
  for (int64_t i = 0; i < args.count * kSteps; ++i) new (arrays.steps + i) Step();
}

bool decoder_stack(const DecoderStack& args, int64_t thread, int64_t threads, void* workspace) {
  const Arrays arrays(args, threads, workspace);
  try {
    Walk walk(args, arrays, thread, threads);
    for (int64_t i = 0; i < args.count; ++i) walk.layer(args.layers[i], args.caches[i]);
  } catch (const Stopped&) {
    return false;
  } catch (...) {
    arrays.shared->failed.store(true, std::memory_order_relaxed);
    throw;
  }
  return true;
}

}  // namespace fq::cpu
