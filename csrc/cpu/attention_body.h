// attention_decode: out = softmax(q k^T * scaling + mask) v over a quantized KV cache. A body: it
// is included into the anonymous namespace of one file per instruction set; before it come lanes.h,
// scratch.h, row_body.h and kv_unpack.h. All variants give the same bits.
//
// The cache is read in chunks of 256 positions, counted from its start. Of one query and chunk:
//
//   dot[j]    = sum_i q[i] (code - zero)[j, i]          code - zero is exact, so nothing cancels as
//   score[j]  = dot[j] * (k_scale[j] * scaling) + mask[j]         q . codes - zero * sum(q) would
//   max       = max_j score[j]
//   e[j]      = exp(score[j] - max), 0 below exp(-44)
//   total     = sum_j e[j]: in 16 lanes, which are then folded in halves
//   weight[j] = e[j] * v_scale[j]; where T is bfloat16, it is two numbers of that type:
//               high = round_bf16(weight), low = round_bf16(weight - high)
//   sum[i]    = sum_j weight[j] (code - zero)[j, i]
//
// A chunk joins those before it, each side times exp(its max - the larger max), and in the end out
// = sum / total. So scratch memory does not grow with the length, and no bit depends on how queries
// are grouped or what is left out: a position that a query may not attend to has score -Inf and
// weight 0, and a chunk of such positions changes nothing. A NaN scale there does no harm.
//
// The two sums of products are made of parts of 32 terms: even = fma over the even ones, ascending
// from 0, odd likewise, sum = sum + (even + odd); with two weights, first high, then low. That is
// the order of the matrix unit of AMX, whose products of bfloat16 are exact: attention_amx.cpp.
//
// A block of consecutive queries of one cache head goes through the cache together, so that
// unpacking a chunk serves them all, in groups of 16 whose scores stay in the nearest cache.

constexpr int64_t kMostQueries = 128;  // of a block
constexpr int64_t kGroup = 16;         // queries
constexpr int64_t kChunk = 256;        // positions
constexpr int64_t kSpan = 64;          // positions that are unpacked together
constexpr int64_t kPart = 32;          // products
constexpr int64_t kFloatBytes = sizeof(float);
constexpr float kMinusInfinity = -__builtin_inff();

struct Chunk {
  int64_t first, count;  // positions
  int64_t slot;          // of the first one in the cache
};

// The positions of a chunk that some query of a group may attend to, in whole spans.
struct Reach {
  int64_t begin, end;
  bool masked;  // the mask's rows are needed
};

// The sizes and the working memory of one call.
struct Workspace {
  int64_t block;                   // queries at a time
  int64_t depth;                   // head_dim in whole parts, and so in whole words of key codes
  int64_t plane;                   // bytes of a row of value codes in whole lanes
  int64_t value_width;             // plane times the codes in a byte
  float *max, *total;              // [block], so far
  float* sums;                     // [block, value_width], so far
  float* scores;                   // [kGroup, kChunk], then the weights
  float* mask;                     // [kGroup, kChunk]
  float* chunk_sums;               // [kGroup, value_width]
  float *key_scale, *value_scale;  // [kChunk]: times scaling; the NaN of the contract for any NaN
  uint8_t* rest;                   // what Products asked for

  template <class Products>
  static Workspace make(const AttentionDecode& args, int64_t queries) {
    Workspace w;
    const int64_t head = args.heads / args.kv_heads * args.tq;
    w.block = queries < head ? queries : head;
    w.block = w.block < kMostQueries ? (w.block + kGroup - 1) / kGroup * kGroup : kMostQueries;
    w.depth = (args.head_dim + kPart - 1) / kPart * kPart;
    w.plane = whole_lanes(packed_bytes(args.head_dim, args.v_bits));
    w.value_width = w.plane * (8 / code_width(args.v_bits));
    const int64_t floats =
        w.block * (2 + w.value_width) + kGroup * (2 * kChunk + w.value_width) + 2 * kChunk;
    w.max = static_cast<float*>(scratch(floats * kFloatBytes + Products::bytes(w)));
    w.total = w.max + w.block;
    w.sums = w.total + w.block;
    w.scores = w.sums + w.block * w.value_width;
    w.mask = w.scores + kGroup * kChunk;
    w.chunk_sums = w.mask + kGroup * kChunk;
    w.key_scale = w.chunk_sums + kGroup * w.value_width;
    w.value_scale = w.key_scale + kChunk;
    w.rest = reinterpret_cast<uint8_t*>(w.value_scale + kChunk);
    return w;
  }
};

// exp(x) for x <= 0, within 2 ulp; 0 below exp(-44) = 2^-63.5, NaN for NaN.
inline __attribute__((always_inline)) Floats falling_exp(Floats x) {
  const Floats magic = Floats::splat(12582912.0f);  // as in exponential of contract.h
  const Floats shifted = fma(x, Floats::splat(1.44269504088896341f), magic);
  const Floats n = shifted - magic;
  const Floats r = fma(n, Floats::splat(-0.693147180559945f), x);
  Floats p = fma(r, Floats::splat(1.381446476e-03f), Floats::splat(8.368780623e-03f));
  p = fma(p, r, Floats::splat(4.166839426e-02f));
  p = fma(p, r, Floats::splat(1.666652011e-01f));
  p = fma(p, r, Floats::splat(4.999999341e-01f));
  p = fma(p, r, Floats::splat(1.0f));
  p = fma(p, r, Floats::splat(1.0f));
  const Floats power = Floats::of(shifted.bits().left<23>() + Bits::splat(bits_of(1.0f)));
  return where_less(x, Floats::splat(-44.0f), zeros(), p * power);
}

// Where the mask's row of query u begins.
inline int64_t mask_offset(const AttentionDecode& args, int64_t u) {
  const int64_t b = u / (args.heads * args.tq), h = u / args.tq % args.heads, i = u % args.tq;
  return b * args.mask_strides[0] + h * args.mask_strides[1] + i * args.mask_strides[2];
}

// What a group's mask says of a span.
struct Sight {
  bool any, all;  // positions that some query, that every query may attend to
};

// rows: of a bool mask, at the first position of the span.
inline Sight look_at_bools(const uint8_t* const* rows, int64_t count, int64_t stride,
                           int64_t positions) {
  static_assert(kSpan == sizeof(uint32_t) * kLanes, "one load");
  Bits any = Bits::splat(0), all = Bits::splat(0xffffffffu);
  for (int64_t r = 0; r < count; ++r) {
    uint8_t part[kSpan];
    const bool whole = stride == 1 && positions == kSpan;
    if (!whole)  // past the end the last one again
      for (int64_t j = 0; j < kSpan; ++j)
        part[j] = rows[r][(j < positions ? j : positions - 1) * stride];
    const Bits row = Bits::load(whole ? rows[r] : part);
    any = any | row;
    all = all & row;
  }
  uint64_t bytes[2][kSpan / 8];
  any.store(bytes[0]);
  all.store(bytes[1]);
  uint64_t some = 0, missing = 0;
  for (int i = 0; i < kSpan / 8; ++i) {
    constexpr uint64_t kOnes = 0x0101010101010101u;
    some |= bytes[0][i];
    missing |= (bytes[1][i] - kOnes) & ~bytes[1][i] & (kOnes << 7);  // bytes that are 0
  }
  return {some != 0, missing == 0};
}

// Fills in the rows of an additive mask.
inline Sight look_at_floats(const AttentionDecode& args, const Workspace& w, const int64_t* offsets,
                            int64_t rows, int64_t span, int64_t positions) {
  const int64_t stride = args.mask_strides[3];
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = w.mask + r * kChunk + span;
    if (stride == 1)
      widen_row(args.mask, args.mask_dtype, offsets[r], positions, row);
    else
      for (int64_t j = 0; j < positions; ++j)
        row[j] = load(args.mask, args.mask_dtype, offsets[r] + j * stride);
    for (int64_t j = 0; j < positions; ++j) any |= row[j] != kMinusInfinity;
    for (int64_t j = positions; j < kSpan; ++j) row[j] = 0.0f;
  }
  return {any, false};
}

// What the mask says of a group in a chunk, whose rows begin at `starts`; fills in the mask's rows
// if they are needed.
inline Reach look_at_mask(const AttentionDecode& args, const Workspace& w, const int64_t* starts,
                          int64_t rows, const Chunk& chunk) {
  const int64_t count = chunk.count, whole = (count + kSpan - 1) / kSpan * kSpan;
  if (args.mask_kind == Mask::kNone) return {0, whole, false};
  const int64_t stride = args.mask_strides[3];
  const uint8_t* const mask = static_cast<const uint8_t*>(args.mask);
  const bool logical = args.mask_kind == Mask::kBool;
  Reach reach{whole, 0, false};
  for (int64_t span = 0; span < whole; span += kSpan) {
    const int64_t positions = span + kSpan < count ? kSpan : count - span;
    int64_t offsets[kGroup];
    const uint8_t* bools[kGroup];
    for (int64_t r = 0; r < rows; ++r) {
      offsets[r] = starts[r] + (chunk.first + span) * stride;
      bools[r] = mask + offsets[r];
    }
    const Sight sight = logical ? look_at_bools(bools, rows, stride, positions)
                                : look_at_floats(args, w, offsets, rows, span, positions);
    if (!sight.any) continue;
    // a span between two others that nobody may attend to has to be masked
    reach.masked |= !sight.all || (reach.end > 0 && reach.end < span);
    if (reach.begin > span) reach.begin = span;
    reach.end = span + kSpan;
  }
  if (!logical || !reach.masked) return reach;
  const int64_t stop = reach.end < count ? reach.end : count;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* const allowed = mask + starts[r] + chunk.first * stride;
    float* const row = w.mask + r * kChunk;
    if (stride == 1)
      for (int64_t j = reach.begin; j < stop; ++j) row[j] = allowed[j] ? 0.0f : kMinusInfinity;
    else
      for (int64_t j = reach.begin; j < stop; ++j)
        row[j] = allowed[j * stride] ? 0.0f : kMinusInfinity;
    for (int64_t j = stop; j < reach.end; ++j) row[j] = 0.0f;
  }
  return reach;
}

struct Weighed {
  float max, total;
};

// The dots of one query become scores; returns their maximum.
template <bool kMasked>
inline float scale_row(const Workspace& w, int64_t begin, int64_t stop, int64_t row) {
  float* const scores = w.scores + row * kChunk;
  const float* const mask = w.mask + row * kChunk;
  const Floats infinite = Floats::splat(kMinusInfinity);
  Floats most[2] = {infinite, infinite};
  const auto scale = [&](int64_t j, Floats& highest) __attribute__((always_inline)) {
    Floats score = Floats::load(scores + j) * Floats::load(w.key_scale + j);
    if constexpr (kMasked) {
      const Floats added = Floats::load(mask + j);
      score = where_equal(added, infinite, infinite, score + added);
    }
    score.store(scores + j);
    highest = larger(score, highest);  // without a NaN: it returns as exp(NaN)
  };
  for (int64_t j = begin; j < stop; j += 2 * kLanes) {
    scale(j, most[0]);
    scale(j + kLanes, most[1]);
  }
  return larger(most[0], most[1]).largest();
}

// The scores of one query become weights: put(j, a, b) takes those of 32 positions from j on.
template <class Put>
inline __attribute__((always_inline)) Weighed weigh_row(const Workspace& w, int64_t begin,
                                                        int64_t stop, int64_t row, float max,
                                                        Put put) {
  const float* const scores = w.scores + row * kChunk;
  const Floats infinite = Floats::splat(kMinusInfinity);
  const Floats top = Floats::splat(max == kMinusInfinity ? 0.0f : max);
  Floats total = zeros();
  const auto weight = [&](int64_t j) __attribute__((always_inline)) {
    const Floats score = Floats::load(scores + j), e = falling_exp(score - top);
    total = total + e;
    return where_equal(score, infinite, zeros(), e * Floats::load(w.value_scale + j));
  };
  for (int64_t j = begin; j < stop; j += 2 * kLanes) {
    const Floats first = weight(j);
    put(j, first, weight(j + kLanes));
  }
  return {max, total.sum()};
}

// Adds a chunk to what query `query` of the block has so far.
inline void join(const Workspace& w, int64_t query, const Weighed& chunk, const float* sums) {
  if (chunk.max == kMinusInfinity && chunk.total == 0.0f) return;
  const float max = w.max[query] > chunk.max ? w.max[query] : chunk.max;
  const Floats top = Floats::splat(max == kMinusInfinity ? 0.0f : max);
  const Floats before = falling_exp(Floats::splat(w.max[query]) - top);
  const Floats now = falling_exp(Floats::splat(chunk.max) - top);
  float total[kLanes];
  fma(Floats::splat(w.total[query]), before, Floats::splat(chunk.total) * now).store(total);
  w.max[query] = max;
  w.total[query] = total[0];
  float* const all = w.sums + query * w.value_width;
  for (int64_t i = 0; i < w.value_width; i += kLanes)
    fma(Floats::load(all + i), before, Floats::load(sums + i) * now).store(all + i);
}

inline void load_scales(const AttentionDecode& args, const Workspace& w, const Chunk& chunk) {
  for (int64_t j = 0; j < chunk.count; ++j) {
    const float scale = args.v_scale[chunk.slot + j];
    w.key_scale[j] = args.k_scale[chunk.slot + j] * args.scaling;
    w.value_scale[j] = scale == scale ? scale : quiet_nan();
  }
  for (int64_t j = chunk.count; j < kChunk; ++j) {  // dots there are -Inf
    w.key_scale[j] = 1.0f;
    w.value_scale[j] = 0.0f;
  }
}

// The rows of planes, back in the order of the elements.
template <int kPerByte>
inline void interleave(const float* planes, int64_t plane, int64_t d, float* out) {
  const int64_t whole = d / kPerByte;
  for (int64_t b = 0; b < whole; ++b)
    for (int i = 0; i < kPerByte; ++i) out[b * kPerByte + i] = planes[i * plane + b];
  for (int64_t i = whole * kPerByte; i < d; ++i) out[i] = planes[i % kPerByte * plane + whole];
}

// out = sums / total for query `query` of the block, which is u of all.
inline void finish(const AttentionDecode& args, const Workspace& w, int64_t query, int64_t u) {
  const int64_t d = args.head_dim;
  const float total = w.total[query];
  float* const sums = w.sums + query * w.value_width;
  const Floats divisor = Floats::splat(total == 0.0f ? 1.0f : total);  // the sums are 0 then
  for (int64_t i = 0; i < w.value_width; i += kLanes)
    (Floats::load(sums + i) / divisor).store(sums + i);
  float* const row = w.chunk_sums;
  if (args.v_bits == 2)
    interleave<4>(sums, w.plane, d, row);
  else if (args.v_bits <= 4)
    interleave<2>(sums, w.plane, d, row);
  else
    interleave<1>(sums, w.plane, d, row);
  narrow_row(row, args.dtype, u * d, d, args.out);
}

// Queries [u, u + count), a block of cache head `head`, and chunks [begin, end) of it: calls
// take(query of the block, chunk, its max and total, its sums) where a query may attend to some.
template <class Products, class Take>
inline void attend_chunks(const AttentionDecode& args, const Workspace& w, Products& products,
                          int64_t u, int64_t count, int64_t head, int64_t begin, int64_t end,
                          Take take) {
  products.start(u, count);
  int64_t starts[kMostQueries];  // of the mask's rows
  for (int64_t q = 0; q < count; ++q) starts[q] = mask_offset(args, u + q);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * kChunk, left = args.length - first;
    const Chunk chunk{first, left < kChunk ? left : kChunk, head * args.capacity + first};
    const int64_t tail = (chunk.count + kPart - 1) / kPart * kPart;
    bool entered = false;
    for (int64_t q = 0; q < count; q += kGroup) {
      const int64_t rows = count - q < kGroup ? count - q : kGroup;
      const Reach reach = look_at_mask(args, w, starts + q, rows, chunk);
      if (reach.begin >= reach.end) continue;
      if (!entered) {
        load_scales(args, w, chunk);
        products.enter(chunk);
        entered = true;
      }
      products.score(q, rows, reach);
      const int64_t stop = reach.end < tail ? reach.end : tail;
      Weighed weighed[kGroup];
      for (int64_t r = 0; r < rows; ++r) {
        float* const dots = w.scores + r * kChunk;
        for (int64_t j = chunk.count; j < stop; ++j) dots[j] = kMinusInfinity;
        weighed[r].max = reach.masked ? scale_row<true>(w, reach.begin, stop, r)
                                      : scale_row<false>(w, reach.begin, stop, r);
      }
      for (int64_t r = 0; r < rows; ++r)
        weighed[r] = products.weigh(reach.begin, stop, r, weighed[r].max);
      products.add(rows, reach);
      for (int64_t r = 0; r < rows; ++r)
        take(q + r, index, weighed[r], w.chunk_sums + r * w.value_width);
    }
  }
}

inline void start_joining(const Workspace& w, int64_t count) {
  for (int64_t q = 0; q < count; ++q) {
    w.max[q] = kMinusInfinity;
    w.total[q] = 0.0f;
  }
  for (int64_t i = 0; i < count * w.value_width; ++i) w.sums[i] = 0.0f;
}

inline int64_t chunks_of(const AttentionDecode& args) {
  return (args.length + kChunk - 1) / kChunk;
}

// Queries [u, u + count), a block of cache head `head`.
template <class Products>
inline void attend(const AttentionDecode& args, const Workspace& w, Products& products, int64_t u,
                   int64_t count, int64_t head) {
  start_joining(w, count);
  const auto add = [&](int64_t query, int64_t, const Weighed& weighed, const float* sums) {
    join(w, query, weighed, sums);
  };
  attend_chunks(args, w, products, u, count, head, 0, chunks_of(args), add);
  for (int64_t q = 0; q < count; ++q) finish(args, w, q, u + q);
}

// ---- a sequence in parts: see AttentionParts

inline float* part_of(const AttentionParts& parts, const Workspace& w, int64_t u, int64_t chunk) {
  return parts.memory + (u * parts.chunks + chunk) * (2 + w.value_width);
}

// Units [begin, end), all of one head.
template <class Products>
inline void attend_parts(const AttentionParts& parts, const Workspace& w, Products& products,
                         int64_t begin, int64_t end) {
  const AttentionDecode& args = parts.args;
  const int64_t head = begin / parts.chunks, first = begin - head * parts.chunks;
  const int64_t u = head * parts.queries, last = first + end - begin;
  for (int64_t q = 0; q < parts.queries; ++q)
    for (int64_t chunk = first; chunk < last; ++chunk) {
      float* const part = part_of(parts, w, u + q, chunk);
      part[0] = kMinusInfinity;
      part[1] = 0.0f;
    }
  const auto keep = [&](int64_t query, int64_t chunk, const Weighed& weighed, const float* sums) {
    float* const part = part_of(parts, w, u + query, chunk);
    part[0] = weighed.max;
    part[1] = weighed.total;
    __builtin_memcpy(part + 2, sums, static_cast<std::size_t>(w.value_width * kFloatBytes));
  };
  attend_chunks(args, w, products, u, parts.queries, head, first, last, keep);
}

// Calls f(begin, end) for the units of every head.
template <class F>
inline void by_head(const AttentionParts& parts, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t stop = (begin / parts.chunks + 1) * parts.chunks;
    f(begin, stop < end ? stop : end);
    begin = stop;
  }
}

// Calls f(u, count, head) for every block of queries in [begin, end).
template <class F>
inline void in_blocks(const AttentionDecode& args, const Workspace& w, int64_t begin, int64_t end,
                      F f) {
  const int64_t per_head = args.heads / args.kv_heads * args.tq;
  for (int64_t u = begin; u < end;) {
    const int64_t head = u / per_head, last = (head + 1) * per_head;
    const int64_t stop = last < end ? last : end;
    const int64_t count = stop - u < w.block ? stop - u : w.block;
    f(u, count, head);
    u += count;
  }
}
