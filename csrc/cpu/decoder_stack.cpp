// A whole stack of decoder layers in one parallel region. See ../decoder_stack.h.
//
// Every thread walks through the steps of all layers (steps.h). Six steps a layer for one row,
// whose codes every thread makes for itself: that takes less time than to wait for another that
// does. Ten for more rows. Which thread does what changes no bit.
#include "../stack_ops.h"

#include <initializer_list>
#include <new>

#include "rope.h"
#include "steps.h"

namespace fq::cpu {
namespace {

constexpr int64_t kSteps = 10;    // of a layer, at most
constexpr int64_t kPieces = 3;    // of a step, per thread
constexpr int64_t kFewRows = 32;  // more are prepared for a product once a piece: one a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct alignas(kLine) Shared {
  std::atomic<bool> failed;
};

// What lies in the workspace.
struct Memory {
  Shared* shared;
  Step* steps;         // [count, kSteps]
  StackArrays arrays;  // for one row the codes are those of the thread: each makes its own
  int64_t bytes = 0;   // of everything

  Memory(const DecoderStack& args, int64_t thread, int64_t threads, void* workspace) {
    const uintptr_t base = reinterpret_cast<uintptr_t>(workspace);
    const auto take = [&](int64_t size) {
      const uintptr_t found = base + static_cast<uintptr_t>(bytes);
      bytes += ceil_div(size, kLine) * kLine;
      return reinterpret_cast<void*>(found);
    };
    shared = static_cast<Shared*>(take(sizeof(Shared)));
    steps = static_cast<Step*>(take(args.count * kSteps * int64_t{sizeof(Step)}));
    arrays.place(args, take);
    if (args.batch * args.t > 1) return;
    StackArrays other;
    for (int64_t i = 1; i < threads; ++i) (i == thread ? arrays : other).place_codes(args, take);
  }
};

// One thread's walk.
class Walk {
 public:
  Walk(const DecoderStack& args, const Memory& memory, int64_t threads)
      : args_(args),
        arrays_(memory.arrays),
        ops_{args, memory.arrays, args.sizes.a_bits <= 4 && args.sizes.w_bits <= 4},
        steps_(memory.steps, memory.shared->failed),
        threads_(threads),
        rows_(args.batch * args.t) {}

  void layer(const StackLayer& layer, const StackCache& cache) {
    const KroneckerQuantize attention_in = ops_.attention_in(layer), mlp_in = ops_.mlp_in(layer);
    const KroneckerQuantize attention_out = ops_.attention_out(layer),
                            mlp_out = ops_.mlp_out(layer);
    run(attention_in, {ops_.multiply(attention_in, layer.q, arrays_.q),
                       ops_.multiply(attention_in, layer.k, arrays_.k),
                       ops_.multiply(attention_in, layer.v, arrays_.v)});
    place(layer, cache);
    attend(layer, cache);
    run(attention_out, {ops_.add(attention_out, layer.o)});
    run(mlp_in, {ops_.multiply(mlp_in, layer.gate, arrays_.gate),
                 ops_.multiply(mlp_in, layer.up, arrays_.up)});
    run(mlp_out, {ops_.add(mlp_out, layer.down)});
  }

 private:
  // Units to take at a time, of which `group` share some preparation.
  int64_t piece(int64_t units, int64_t group = 1) const {
    const int64_t most = ceil_div(units, threads_), several = ceil_div(units, threads_ * kPieces);
    return group < several ? ceil_div(several, group) * group : group > 1 ? most : several;
  }

  // Codes, and up to three products of them as one list of tiles.
  void run(const KroneckerQuantize& input, std::initializer_list<GemmInteger> products) {
    bool coded = rows_ > 1;
    if (coded)
      steps_.share(rows_, piece(rows_),
                   [&](int64_t begin, int64_t end) { kronecker_quantize(input, begin, end); });

    const auto gemm = args_.sizes.w_bits > 4 ? &gemm_w8a8 : ops_.nibbles ? &gemm_w4a4 : &gemm_w4a8;
    int64_t all = 0;
    for (const GemmInteger& product : products) all += gemm_tiles(product);
    const int64_t size = rows_ > kFewRows ? ceil_div(all, threads_) : piece(all);
    steps_.share(all, size, [&](int64_t begin, int64_t end) {
      if (!coded) kronecker_quantize(input, 0, rows_);
      coded = true;
      for (const GemmInteger& product : products) {
        const int64_t tiles = gemm_tiles(product), last = end < tiles ? end : tiles;
        if (begin < last) gemm(product, begin, last);
        begin = begin < tiles ? 0 : begin - tiles;
        end -= tiles;
        if (end <= 0) break;
      }
    });
  }

  // RoPE; queries into the basis of the keys; keys and values into the cache. A unit is a row of
  // the queries, then of the cache.
  void place(const StackLayer& layer, const StackCache& cache) {
    const int64_t queries = rows_ * args_.sizes.heads;
    const int64_t all = queries + rows_ * args_.sizes.kv_heads;
    steps_.share(all, ceil_div(all, threads_), [&](int64_t begin, int64_t end) {
      if (begin < queries) place_queries(layer, begin, end < queries ? end : queries);
      if (end > queries)
        place_keys(layer, cache, begin < queries ? 0 : begin - queries, end - queries);
    });
  }

  void place_queries(const StackLayer& layer, int64_t begin, int64_t end) const {
    rotate(arrays_.q, args_.sizes.heads, arrays_.q_heads, begin, end);
    if (layer.q_transform) kronecker(ops_.turn_queries(layer), begin, end);
  }

  void place_keys(const StackLayer& layer, const StackCache& cache, int64_t begin,
                  int64_t end) const {
    const int64_t heads = args_.sizes.kv_heads;
    rotate(arrays_.k, heads, arrays_.k_heads, begin, end);
    for (int64_t row = begin; row < end && args_.t > 1; ++row)
      copy_head(arrays_.v, by_token(row, heads), arrays_.v_heads, row);
    kv_quantize_append(ops_.append_keys(layer, cache), begin, end);
    kv_quantize_append(ops_.append_values(layer, cache), begin, end);
  }

  void rotate(const void* x, int64_t heads, void* out, int64_t begin, int64_t end) const {
    rope({x, args_.cos, args_.sin, out, args_.t, heads, args_.sizes.head_dim, args_.cos_batch,
          args_.dtype},
         begin, end);
  }

  // Attention; its rows go back to the order of the tokens.
  void attend(const StackLayer& layer, const StackCache& cache) {
    const AttentionDecode op = ops_.attend(layer, cache);
    const int64_t heads = args_.sizes.heads, queries = rows_ * heads;
    const int64_t sharing = heads / args_.sizes.kv_heads * args_.t;  // of one cache head
    steps_.share(queries, piece(queries, sharing), [&](int64_t begin, int64_t end) {
      attention_decode(op, begin, end);
      for (int64_t row = begin; row < end && args_.t > 1; ++row)
        copy_head(arrays_.attended, row, arrays_.attended_rows, by_token(row, heads));
    });
  }

  // Row `row` of [batch, heads, t], in [batch, t, heads].
  int64_t by_token(int64_t row, int64_t heads) const {
    const int64_t i = row % args_.t, h = row / args_.t % heads, b = row / args_.t / heads;
    return (b * args_.t + i) * heads + h;
  }

  // Row `from` of x becomes row `to` of out, both [.., head_dim].
  void copy_head(const void* x, int64_t from, void* out, int64_t to) const {
    const int64_t bytes = args_.sizes.head_dim * size_of(args_.dtype);
    __builtin_memcpy(static_cast<uint8_t*>(out) + to * bytes,
                     static_cast<const uint8_t*>(x) + from * bytes,
                     static_cast<std::size_t>(bytes));
  }

  const DecoderStack& args_;
  const StackArrays& arrays_;
  const StackOps ops_;
  Steps steps_;
  const int64_t threads_, rows_;
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
  return Memory(args, 0, threads, nullptr).bytes;
}

void decoder_stack_begin(const DecoderStack& args, int64_t threads, void* workspace) {
  const Memory memory(args, 0, threads, workspace);
  new (memory.shared) Shared();
  for (int64_t i = 0; i < args.count * kSteps; ++i) new (memory.steps + i) Step();
}

bool decoder_stack(const DecoderStack& args, int64_t thread, int64_t threads, void* workspace) {
  const Memory memory(args, thread, threads, workspace);
  try {
    Walk walk(args, memory, threads);
    for (int64_t i = 0; i < args.count; ++i) walk.layer(args.layers[i], args.caches[i]);
  } catch (const Stopped&) {
    return false;
  } catch (...) {
    memory.shared->failed.store(true, std::memory_order_relaxed);
    throw;
  }
  return true;
}

}  // namespace fq::cpu
