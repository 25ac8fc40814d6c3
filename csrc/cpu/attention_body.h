// attention_decode: out = softmax(q k^T * scaling + mask) v over a quantized KV cache. A body: it
// is included into the anonymous namespace of one file per instruction set; needs lanes.h,
// scratch.h and row_body.h before it. All variants give the same bits.
//
// A block of up to 32 consecutive queries of one cache head goes through the cache together, so
// that unpacking a tile of codes, (code - zero) as floats, serves them all; the cache is never
// dequantized anywhere else. Two passes, with the scores [queries, length] in between:
//
//   keys:   16 positions are the lanes, transposed on unpacking
//           score[j] = (sum_i q[i] (code - zero)[j, i]) * (k_scale[j] * scaling) + mask[j]
//           code - zero is exact, so nothing cancels as q . codes - zero * sum(q) would
//   values: the elements are the lanes, in the order of the bytes' fields: all codes in the low
//   bits
//           first, then those above them
//           weight[j] = exp(score[j] - max) * v_scale[j];  sum over j of weight[j] (code - zero)[j,
//           i]
//
// Sums are made of parts of 16 terms, ascending, that join in turn: more exact than one chain, and
// the same however queries are grouped. A position that a query may not attend to has score -Inf
// and weight 0, so a NaN scale there does no harm. Bound: decode, the unpacking; prefill, the fma.

constexpr int64_t kMostQueries = 32, kLeastQueries = 4;
constexpr int64_t kScoreBytes = int64_t{1} << 20;  // of scores, so that they stay in the L2 cache
constexpr int64_t kValueTile = 64;                 // positions of values unpacked at a time
constexpr int64_t kSumPart = 16;                   // products summed up before they join a total
constexpr int64_t kFloatBytes = sizeof(float);
constexpr float kMinusInfinity = -__builtin_inff();

inline int code_width(int bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

// The sizes and the working memory of one call.
struct Workspace {
  int64_t block;         // queries at a time
  int64_t score_width;   // length in whole lanes
  int64_t key_depth;     // head_dim in whole words of key codes
  int64_t plane;         // bytes of a row of value codes in whole lanes
  int64_t value_width;   // plane times the codes in a byte
  float* queries;        // [block, head_dim]
  float* scores;         // [block, score_width], then the weights
  float* sums;           // [block, value_width]
  float* key_tile;       // [key_depth, 16]
  float* value_tile;     // [kValueTile, value_width]
  uint8_t* any_allowed;  // [score_width / 16]: may any query of the block attend to one of them?

  explicit Workspace(const AttentionDecode& args) {
    const int k_width = code_width(args.k_bits), v_width = code_width(args.v_bits);
    const int64_t word = 32 / k_width;
    score_width = whole_lanes(args.length);
    const int64_t fit = kScoreBytes / (score_width * kFloatBytes + 1);
    block = fit > kMostQueries ? kMostQueries : fit < kLeastQueries ? kLeastQueries : fit;
    key_depth = (args.head_dim + word - 1) / word * word;
    plane = whole_lanes(packed_bytes(args.head_dim, args.v_bits));
    value_width = plane * (8 / v_width);

    const int64_t query_size = whole_lanes(block * args.head_dim), score_size = block * score_width;
    const int64_t sum_size = block * value_width, key_size = key_depth * kLanes;
    const int64_t value_size = kValueTile * value_width;
    queries = static_cast<float*>(
        scratch((query_size + score_size + sum_size + key_size + value_size) * kFloatBytes +
                score_width / kLanes));
    scores = queries + query_size;
    sums = scores + score_size;
    key_tile = sums + sum_size;
    value_tile = key_tile + key_size;
    any_allowed = reinterpret_cast<uint8_t*>(value_tile + value_size);
  }
};

template <int kCount>
struct Constant {
  static constexpr int value = kCount;
};

// Calls f with a constant 8, 4, 2 or 1 and the first index of every group that `count` falls into.
template <class F>
inline void in_groups(int64_t count, F f) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) f(Constant<8>(), i);
  for (; i + 4 <= count; i += 4) f(Constant<4>(), i);
  for (; i + 2 <= count; i += 2) f(Constant<2>(), i);
  for (; i < count; ++i) f(Constant<1>(), i);
}

// What the mask adds to the scores of query u: -Inf where it may not attend.
inline void mask_row(const AttentionDecode& args, int64_t u, int64_t width, float* out) {
  const int64_t b = u / (args.heads * args.tq), h = u / args.tq % args.heads, i = u % args.tq;
  const int64_t base =
      b * args.mask_strides[0] + h * args.mask_strides[1] + i * args.mask_strides[2];
  const int64_t stride = args.mask_strides[3], length = args.length;
  const uint8_t* const allowed = static_cast<const uint8_t*>(args.mask) + base;
  if (args.mask_kind == Mask::kNone)
    for (int64_t j = 0; j < length; ++j) out[j] = 0.0f;
  else if (args.mask_kind == Mask::kBool && stride == 1)
    for (int64_t j = 0; j < length; ++j) out[j] = allowed[j] ? 0.0f : kMinusInfinity;
  else if (args.mask_kind == Mask::kBool)
    for (int64_t j = 0; j < length; ++j) out[j] = allowed[j * stride] ? 0.0f : kMinusInfinity;
  else if (stride == 1)
    widen_row(args.mask, args.mask_dtype, base, length, out);
  else
    for (int64_t j = 0; j < length; ++j)
      out[j] = load(args.mask, args.mask_dtype, base + j * stride);
  for (int64_t j = length; j < width; ++j) out[j] = kMinusInfinity;
}

// May one of the queries attend to one of the 16 positions from `first` on?
inline bool any_allowed(const Workspace& space, int64_t count, int64_t first) {
  uint32_t differs[kLanes] = {};  // bits in which a score is not -Inf
  for (int64_t q = 0; q < count; ++q)
    for (int l = 0; l < kLanes; ++l)
      differs[l] |= bits_of(space.scores[q * space.score_width + first + l]) ^ 0xff800000u;
  uint32_t any = 0;
  for (int l = 0; l < kLanes; ++l) any |= differs[l];
  return any != 0;
}

// Scores of queries [u, u + count) against all positions.
inline void score_keys(const AttentionDecode& args, const Workspace& space, int64_t u,
                       int64_t count, int64_t cache_row) {
  const int64_t d = args.head_dim, key_bytes = packed_bytes(d, args.k_bits);
  for (int64_t q = 0; q < count; ++q)
    mask_row(args, u + q, space.score_width, space.scores + q * space.score_width);
  for (int64_t first = 0; first < args.length; first += kLanes) {
    const bool any = any_allowed(space, count, first);
    space.any_allowed[first / kLanes] = any;
    if (!any) continue;

    const uint8_t* rows[kLanes];
    float zero[kLanes], scale[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) {  // past the last position: that one again, unused
      const int64_t slot = cache_row + (first + l < args.length ? first + l : args.length - 1);
      rows[l] = args.k_codes + slot * key_bytes;
      zero[l] = static_cast<float>(args.k_zero[slot]);
      scale[l] = args.k_scale[slot] * args.scaling;
    }
    unpack_transposed(rows, key_bytes, code_width(args.k_bits), 0u, Floats::load(zero),
                      space.key_tile);

    in_groups(count, [&](auto group, int64_t q0) __attribute__((always_inline)) {
      constexpr int kQueries = decltype(group)::value;
      const float* const queries = space.queries + q0 * d;
      Floats dots[kQueries];
      for (int q = 0; q < kQueries; ++q) dots[q] = Floats::splat(0.0f);
      for (int64_t i0 = 0; i0 < d; i0 += kSumPart) {
        const int64_t stop = i0 + kSumPart < d ? i0 + kSumPart : d;
        Floats part[kQueries];
        for (int q = 0; q < kQueries; ++q) part[q] = Floats::splat(0.0f);
        for (int64_t i = i0; i < stop; ++i) {
          const Floats key = Floats::load(space.key_tile + i * kLanes);
          for (int q = 0; q < kQueries; ++q)
            part[q] = fma(Floats::splat(queries[q * d + i]), key, part[q]);
        }
        for (int q = 0; q < kQueries; ++q) dots[q] = dots[q] + part[q];
      }
      for (int q = 0; q < kQueries; ++q) {
        float* const score = space.scores + (q0 + q) * space.score_width + first;
        float sum[kLanes];
        (dots[q] * Floats::load(scale) + Floats::load(score)).store(sum);
        for (int l = 0; l < kLanes; ++l)
          score[l] = score[l] == kMinusInfinity ? kMinusInfinity : sum[l];
      }
    });
  }
}

// The scores of one query become weights exp(score - max) * v_scale; returns the sum of exp(score -
// max).
inline float weigh(const AttentionDecode& args, const Workspace& space, float* scores,
                   int64_t cache_row) {
  Floats most = Floats::splat(kMinusInfinity);
  for (int64_t first = 0; first < args.length; first += kLanes)
    most = larger(Floats::load(scores + first), most);  // without a NaN: it returns as exp(NaN)
  float highest[kLanes], total[kLanes] = {};
  most.store(highest);
  float max = kMinusInfinity;
  for (int l = 0; l < kLanes; ++l) max = highest[l] > max ? highest[l] : max;

  for (int64_t first = 0; first < args.length; first += kLanes) {
    if (!space.any_allowed[first / kLanes]) {
      for (int l = 0; l < kLanes; ++l) scores[first + l] = 0.0f;
      continue;
    }
    float scale[kLanes] = {};
    const int64_t count = args.length - first < kLanes ? args.length - first : kLanes;
    for (int64_t l = 0; l < count; ++l) scale[l] = args.v_scale[cache_row + first + l];
    for (int l = 0; l < kLanes; ++l) {
      const float score = scores[first + l];
      const float e = exponential(score - max);
      const bool allowed = score != kMinusInfinity;
      total[l] = total[l] + (allowed ? e : 0.0f);
      scores[first + l] = allowed ? e * scale[l] : 0.0f;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) total[l] = total[l] + total[l + half];
  return total[0];
}

template <int kWidth>
inline void unpack_value(const uint8_t* bytes, int64_t count, int64_t plane, float zero,
                         float* out) {
  constexpr int kMask = (1 << kWidth) - 1;
  for (int field = 0; field < 8 / kWidth; ++field, out += plane) {
    for (int64_t b = 0; b < count; ++b)
      out[b] = static_cast<float>((bytes[b] >> (kWidth * field)) & kMask) - zero;
    for (int64_t b = count; b < plane; ++b) out[b] = 0.0f;
  }
}

// sums [count, value_width] = weights [count, length] times the values.
inline void add_values(const AttentionDecode& args, const Workspace& space, int64_t count,
                       int64_t cache_row) {
  const int64_t value_bytes = packed_bytes(args.head_dim, args.v_bits), width = space.value_width;
  for (int64_t i = 0; i < count * width; ++i) space.sums[i] = 0.0f;
  for (int64_t first = 0; first < args.length; first += kValueTile) {
    const int64_t positions = args.length - first < kValueTile ? args.length - first : kValueTile;
    bool any = false;
    for (int64_t l = 0; l < positions; l += kLanes)
      any |= space.any_allowed[(first + l) / kLanes] != 0;
    if (!any) continue;

    for (int64_t j = 0; j < positions; ++j) {
      const int64_t slot = cache_row + first + j;
      const uint8_t* const bytes = args.v_codes + slot * value_bytes;
      const float zero = static_cast<float>(args.v_zero[slot]);
      float* const out = space.value_tile + j * width;
      if (args.v_bits == 2)
        unpack_value<2>(bytes, value_bytes, space.plane, zero, out);
      else if (args.v_bits <= 4)
        unpack_value<4>(bytes, value_bytes, space.plane, zero, out);
      else
        unpack_value<8>(bytes, value_bytes, space.plane, zero, out);
    }
    in_groups(count, [&](auto group, int64_t q0) __attribute__((always_inline)) {
      constexpr int kQueries = decltype(group)::value;
      const float* const weights = space.scores + q0 * space.score_width + first;
      for (int64_t column = 0; column < width; column += kLanes) {
        Floats totals[kQueries];
        for (int q = 0; q < kQueries; ++q)
          totals[q] = Floats::load(space.sums + (q0 + q) * width + column);
        for (int64_t j0 = 0; j0 < positions; j0 += kSumPart) {
          const int64_t stop = j0 + kSumPart < positions ? j0 + kSumPart : positions;
          Floats part[kQueries];
          for (int q = 0; q < kQueries; ++q) part[q] = Floats::splat(0.0f);
          for (int64_t j = j0; j < stop; ++j) {
            const Floats value = Floats::load(space.value_tile + j * width + column);
            for (int q = 0; q < kQueries; ++q)
              part[q] = fma(Floats::splat(weights[q * space.score_width + j]), value, part[q]);
          }
          for (int q = 0; q < kQueries; ++q) totals[q] = totals[q] + part[q];
        }
        for (int q = 0; q < kQueries; ++q) totals[q].store(space.sums + (q0 + q) * width + column);
      }
    });
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

// out = sums / total for query u. Overwrites the first row of the value tile.
inline void finish(const AttentionDecode& args, const Workspace& space, float* sums, float total,
                   int64_t u) {
  const int64_t d = args.head_dim;
  for (int64_t i = 0; i < space.value_width; ++i) sums[i] = total == 0.0f ? 0.0f : sums[i] / total;
  float* const row = space.value_tile;
  if (args.v_bits == 2)
    interleave<4>(sums, space.plane, d, row);
  else if (args.v_bits <= 4)
    interleave<2>(sums, space.plane, d, row);
  else
    interleave<1>(sums, space.plane, d, row);
  narrow_row(row, args.dtype, u * d, d, args.out);
}

inline void attention_decode_body(const AttentionDecode& args, int64_t begin, int64_t end) {
  const Workspace space(args);
  const int64_t d = args.head_dim;
  const int64_t per_cache_head = args.heads / args.kv_heads * args.tq;
  for (int64_t u = begin; u < end;) {
    const int64_t cache_head = u / per_cache_head, cache_row = cache_head * args.capacity;
    int64_t stop = (cache_head + 1) * per_cache_head;
    stop = stop < end ? stop : end;
    const int64_t count = stop - u < space.block ? stop - u : space.block;

    widen_row(args.q, args.dtype, u * d, count * d, space.queries);
    score_keys(args, space, u, count, cache_row);
    float totals[kMostQueries];
    for (int64_t q = 0; q < count; ++q)
      totals[q] = weigh(args, space, space.scores + q * space.score_width, cache_row);
    add_values(args, space, count, cache_row);
    for (int64_t q = 0; q < count; ++q)
      finish(args, space, space.sums + q * space.value_width, totals[q], u + q);
    u += count;
  }
}
