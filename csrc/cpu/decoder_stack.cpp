// A whole stack of decoder layers in one parallel region. See ../decoder_stack.h.
//
// Every thread walks through the steps of all layers (steps.h). Six steps a layer for one row,
// whose codes every thread makes for itself: that takes less time than to wait for another that
// does. Ten for more rows. Which thread does what changes no bit.
#include "../stack_ops.h"

#include <initializer_list>
#include <new>

#include "attention.h"
#include "gemm_tiles.h"
#include "rope.h"
#include "steps.h"

namespace fq::cpu {
namespace {

constexpr int64_t kSteps = 10;    // of a layer, at most
constexpr int64_t kPieces = 3;    // of a step, per thread
constexpr int64_t kFewRows = 32;  // more are prepared for a product once a piece: one a thread

constexpr int64_t kAheadBytes = 64 << 10;  // of weights, fetched into the level 2 cache
constexpr int64_t kIdleLines = 4;          // at a time, while a thread waits
constexpr int64_t kBusyLines = 64;         // before it makes codes

struct alignas(kLine) Shared {
  std::atomic<bool> failed;
};

// Whether threads share the cached positions of a head: with few heads some would have nothing to
// do, or one of them twice as much as another.
bool in_parts(const DecoderStack& args, int64_t threads) {
  constexpr int64_t kMostQueries = 128;  // of AttentionParts
  const int64_t heads = args.batch * args.sizes.kv_heads;
  const int64_t queries = args.sizes.heads / args.sizes.kv_heads * args.t;
  const bool is_long = args.past + args.t > 2 * 256;
  return threads > 1 && is_long && queries <= kMostQueries && heads < threads * kPieces;
}

// What lies in the workspace.
struct Memory {
  Shared* shared;
  Step* steps;             // [count, kSteps]
  StackArrays arrays;      // for one row the codes are those of the thread: each makes its own
  float* parts = nullptr;  // see AttentionParts
  std::atomic<int64_t>* done = nullptr;  // [count, batch * kv_heads], parts of a head
  int64_t bytes = 0;                     // of everything

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
    if (in_parts(args, threads)) {
      const StackOps ops{args, arrays, false};
      const AttentionDecode one = ops.attend(args.layers[0], args.caches[0]);
      parts =
          static_cast<float*>(take(attention_parts_floats(attention_in_parts(one, nullptr)) * 4));
      done = static_cast<std::atomic<int64_t>*>(take(args.count * heads(args) * 8));
    }
    if (args.batch * args.t > 1) return;
    StackArrays other;
    for (int64_t i = 1; i < threads; ++i) (i == thread ? arrays : other).place_codes(args, take);
  }

  static int64_t heads(const DecoderStack& args) { return args.batch * args.sizes.kv_heads; }
};

// Weights that a thread will read soon: up to three stretches of memory, to be fetched bit by bit.
class Ahead {
 public:
  void clear() { count_ = next_ = 0, left_ = kAheadBytes; }

  void add(const uint8_t* at, int64_t bytes) {
    const int64_t some = bytes < left_ ? bytes : left_;
    if (some <= 0) return;
    stretches_[count_++] = {at, at + some};
    left_ -= some;
  }

  // Fetches the next lines; false if all have been.
  bool fetch(int64_t lines) {
    if (next_ == count_) return false;
    for (; lines > 0 && next_ < count_; --lines) {
      Stretch& stretch = stretches_[next_];
      __builtin_prefetch(stretch.at, 0, 2);
      stretch.at += kLine;
      if (stretch.at >= stretch.end) ++next_;
    }
    return true;
  }

 private:
  struct Stretch {
    const uint8_t *at, *end;
  } stretches_[3];
  int count_ = 0, next_ = 0;
  int64_t left_ = 0;
};

// One thread's walk.
class Walk {
 public:
  Walk(const DecoderStack& args, const Memory& memory, int64_t thread, int64_t threads)
      : args_(args),
        memory_(memory),
        arrays_(memory.arrays),
        ops_{args, memory.arrays, args.sizes.a_bits <= 4 && args.sizes.w_bits <= 4},
        steps_(memory.steps, memory.shared->failed, static_cast<int>(thread % 2)),
        thread_(thread),
        threads_(threads),
        rows_(args.batch * args.t) {}

  // next: the layer after it; after the last one the first, for the next token.
  void layer(const StackLayer& layer, const StackLayer& next, const StackCache& cache) {
    const KroneckerQuantize attention_in = ops_.attention_in(layer), mlp_in = ops_.mlp_in(layer);
    const KroneckerQuantize attention_out = ops_.attention_out(layer),
                            mlp_out = ops_.mlp_out(layer);
    run(attention_in,
        {ops_.multiply(attention_in, layer.q, arrays_.q),
         ops_.multiply(attention_in, layer.k, arrays_.k),
         ops_.multiply(attention_in, layer.v, arrays_.v)},
        {&layer.o}, ops_.attention_width());
    place(layer, cache);
    attend(layer, cache);
    run(attention_out, {ops_.add(attention_out, layer.o)}, {&layer.gate, &layer.up},
        args_.sizes.hidden);
    run(mlp_in,
        {ops_.multiply(mlp_in, layer.gate, arrays_.gate),
         ops_.multiply(mlp_in, layer.up, arrays_.up)},
        {&layer.down}, args_.sizes.intermediate);
    run(mlp_out, {ops_.add(mlp_out, layer.down)}, {&next.q, &next.k, &next.v}, args_.sizes.hidden);
  }

 private:
  using Linears = std::initializer_list<const StackLinear*>;

  // Units to take at a time, of which `group` share some preparation.
  int64_t piece(int64_t units, int64_t group = 1) const {
    const int64_t most = ceil_div(units, threads_), several = ceil_div(units, threads_ * kPieces);
    return group < several ? ceil_div(several, group) * group : group > 1 ? most : several;
  }

  // Fetches weights while it waits.
  template <class Work>
  void share(int64_t units, int64_t piece, Work work) {
    steps_.share(units, piece, work, [&] { return ahead_.fetch(kIdleLines); });
  }

  // Codes, and up to three products of them as one list of tiles. next: what is multiplied then.
  void run(const KroneckerQuantize& input, std::initializer_list<GemmInteger> products,
           Linears next, int64_t next_k) {
    bool coded = rows_ > 1;
    if (coded)
      share(rows_, piece(rows_),
            [&](int64_t begin, int64_t end) { kronecker_quantize(input, begin, end); });

    const auto gemm = args_.sizes.w_bits > 4 ? &gemm_w8a8 : ops_.nibbles ? &gemm_w4a4 : &gemm_w4a8;
    int64_t all = 0;
    for (const GemmInteger& product : products) all += gemm_tiles(product);
    if (!coded) ahead_.fetch(kBusyLines);
    look_ahead(next, next_k);
    share(all, tiles_at_a_time(all), [&](int64_t begin, int64_t end) {
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

  int64_t tiles_at_a_time(int64_t all) const {
    return rows_ > kFewRows ? ceil_div(all, threads_) : piece(all);
  }

  // From now on the weights of these are fetched, from where this thread will begin.
  void look_ahead(Linears next, int64_t k) {
    ahead_.clear();
    const int64_t column = args_.sizes.w_bits > 4 ? k : nibble_bytes(k);
    int64_t all = 0;
    for (const StackLinear* linear : next) all += ceil_div(linear->n, kTileColumns);
    const int64_t size = tiles_at_a_time(all), middle = second_half(all, size);
    int64_t begin = thread_ / 2 * size + (thread_ % 2 == 0 ? 0 : middle);
    int64_t end = threads_ > 2 ? begin + size : thread_ == 0 ? middle : all;
    for (const StackLinear* linear : next) {
      const int64_t tiles = ceil_div(linear->n, kTileColumns);
      const int64_t first = begin * kTileColumns;
      const int64_t last = end < tiles ? end * kTileColumns : linear->n;
      if (begin < tiles && first < last)
        ahead_.add(linear->w + first * column, (last - first) * column);
      begin = begin < tiles ? 0 : begin - tiles;
      end = end < tiles ? 0 : end - tiles;
    }
  }

  // RoPE; queries into the basis of the keys; keys and values into the cache. A unit is a row of
  // the queries, then of the cache.
  void place(const StackLayer& layer, const StackCache& cache) {
    const int64_t queries = rows_ * args_.sizes.heads;
    const int64_t all = queries + rows_ * args_.sizes.kv_heads;
    share(all, ceil_div(all, threads_), [&](int64_t begin, int64_t end) {
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
    if (memory_.done) return attend_in_parts(op, memory_.done + layer_++ * Memory::heads(args_));
    const int64_t heads = args_.sizes.heads, queries = rows_ * heads;
    const int64_t sharing = heads / args_.sizes.kv_heads * args_.t;  // of one cache head
    share(queries, piece(queries, sharing), [&](int64_t begin, int64_t end) {
      attention_decode(op, begin, end);
      copy_attended(begin, end);
    });
  }

  // Who does the last part of a head joins them. done: how many are, of each head.
  void attend_in_parts(const AttentionDecode& op, std::atomic<int64_t>* done) {
    const AttentionParts parts = attention_in_parts(op, memory_.parts);
    const int64_t units = Memory::heads(args_) * parts.chunks;
    share(units, piece(units), [&](int64_t begin, int64_t end) {
      attention_parts(parts, begin, end);
      while (begin < end) {
        const int64_t head = begin / parts.chunks, stop = (head + 1) * parts.chunks;
        const int64_t count = (stop < end ? stop : end) - begin;
        begin += count;
        if (done[head].fetch_add(count, std::memory_order_acq_rel) + count < parts.chunks) continue;
        attention_join(parts, head);
        copy_attended(head * parts.queries, (head + 1) * parts.queries);
      }
    });
  }

  void copy_attended(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end && args_.t > 1; ++row)
      copy_head(arrays_.attended, row, arrays_.attended_rows, by_token(row, args_.sizes.heads));
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
  const Memory& memory_;
  const StackArrays& arrays_;
  const StackOps ops_;
  Steps steps_;
  Ahead ahead_;
  int64_t layer_ = 0;
  const int64_t thread_, threads_, rows_;
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
  const int64_t heads = memory.done ? args.count * Memory::heads(args) : 0;
  for (int64_t i = 0; i < heads; ++i) new (memory.done + i) std::atomic<int64_t>(0);
}

bool decoder_stack(const DecoderStack& args, int64_t thread, int64_t threads, void* workspace) {
  const Memory memory(args, thread, threads, workspace);
  try {
    Walk walk(args, memory, thread, threads);
    for (int64_t i = 0; i < args.count; ++i)
      walk.layer(args.layers[i], args.layers[i + 1 < args.count ? i + 1 : 0], args.caches[i]);
  } catch (const Stopped&) {
    return false;
  } catch (...) {
    memory.shared->failed.store(true, std::memory_order_relaxed);
    throw;
  }
  return true;
}

}  // namespace fq::cpu
