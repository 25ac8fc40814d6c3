// The products of attention_body.h by fused multiply-adds. A body; it comes after that one.

// out [q][t] = x [q] . y [t] over `depth` terms, or is added to: 16 sums per tile t. With a second
// x, its products follow those of the first one after every part.
struct Product {
  const float *x, *second_x;
  int64_t x_stride;
  const float* y;
  int64_t y_stride, y_tile;  // from one term to the next, from one tile to the next
  float* out;
  int64_t out_stride;
  int64_t depth;
  bool add;
};

// kQueries rows and kTiles tiles of it: the sums stay in registers.
template <int kQueries, int kTiles>
inline __attribute__((always_inline)) void product_tile(const Product& p, int64_t q, int64_t t) {
  const float* const y = p.y + t * p.y_tile;
  float* const out = p.out + q * p.out_stride + t * kLanes;
  Floats sum[kQueries][kTiles];
  for (int i = 0; i < kQueries; ++i)
    for (int j = 0; j < kTiles; ++j)
      sum[i][j] = p.add ? Floats::load(out + i * p.out_stride + j * kLanes) : zeros();
  const auto part = [&](const float* x, int64_t first,
                        int64_t stop) __attribute__((always_inline)) {
    Floats even[kQueries][kTiles], odd[kQueries][kTiles];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kTiles; ++j) even[i][j] = odd[i][j] = zeros();
    const auto term = [&](int64_t k, auto& sums) __attribute__((always_inline)) {
      Floats column[kTiles];
      for (int j = 0; j < kTiles; ++j) column[j] = Floats::load(y + k * p.y_stride + j * p.y_tile);
      for (int i = 0; i < kQueries; ++i) {
        const Floats row = Floats::splat(x[i * p.x_stride + k]);
        for (int j = 0; j < kTiles; ++j) sums[i][j] = fma(row, column[j], sums[i][j]);
      }
    };
    int64_t k = first;
    for (; k + 2 <= stop; k += 2) {
      term(k, even);
      term(k + 1, odd);
    }
    if (k < stop) term(k, even);
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kTiles; ++j) sum[i][j] = sum[i][j] + (even[i][j] + odd[i][j]);
  };
  for (int64_t first = 0; first < p.depth; first += kPart) {
    const int64_t stop = first + kPart < p.depth ? first + kPart : p.depth;
    part(p.x + q * p.x_stride, first, stop);
    if (p.second_x) part(p.second_x + q * p.x_stride, first, stop);
  }
  for (int i = 0; i < kQueries; ++i)
    for (int j = 0; j < kTiles; ++j) sum[i][j].store(out + i * p.out_stride + j * kLanes);
}

template <int kQueries>
inline void product_rows(const Product& p, int64_t q, int64_t tiles) {
  // three sums for each, and room for the factors
  constexpr int kFit = kFloatRegisters * 3 / 4 / (3 * kQueries);
  constexpr int kTiles = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  int64_t t = 0;
  for (; t + kTiles <= tiles; t += kTiles) product_tile<kQueries, kTiles>(p, q, t);
  for (; t < tiles; ++t) product_tile<kQueries, 1>(p, q, t);
}

inline void multiply(const Product& p, int64_t queries, int64_t tiles) {
  constexpr int kMost = kFloatRegisters >= 32 ? 4 : 2;
  int64_t q = 0;
  for (; q + kMost <= queries; q += kMost) product_rows<kMost>(p, q, tiles);
  if constexpr (kMost == 4)
    if (q + 3 == queries) return product_rows<3>(p, q, tiles);
  if (q + 2 <= queries) {
    product_rows<2>(p, q, tiles);
    q += 2;
  }
  if (q < queries) product_rows<1>(p, q, tiles);
}

// Keys of 16 positions from `first` of a chunk on, past its end the last one again, unused.
struct KeyRows {
  const uint8_t* rows[kLanes];
  int64_t bytes;  // of a row
  Bits zero;

  KeyRows(const AttentionDecode& args, const Chunk& chunk, int64_t first)
      : bytes(packed_bytes(args.head_dim, args.k_bits)), zero(Bits::splat(0)) {
    const int64_t slot = chunk.slot + first, left = chunk.count - first;
    for (int64_t l = 0; l < kLanes; ++l)
      rows[l] = args.k_codes + (slot + (l < left ? l : left - 1)) * bytes;
    uint8_t last[kLanes] = {};
    if (left < kLanes) __builtin_memcpy(last, args.k_zero + slot, static_cast<std::size_t>(left));
    zero = Bits::widen(left < kLanes ? last : args.k_zero + slot);
  }
};

// tile [depth, 16]
inline void unpack_key_tile(const AttentionDecode& args, const Chunk& chunk, int64_t first,
                            float* tile) {
  const KeyRows keys(args, chunk, first);
  if (args.k_bits == 2)
    unpack_keys<2>(keys.rows, keys.bytes, keys.zero, tile);
  else if (args.k_bits <= 4)
    unpack_keys<4>(keys.rows, keys.bytes, keys.zero, tile);
  else
    unpack_keys<8>(keys.rows, keys.bytes, keys.zero, tile);
}

// Values of one position of a chunk: out [value_width].
inline void unpack_value_row(const AttentionDecode& args, const Workspace& w, const Chunk& chunk,
                             int64_t position, float* out) {
  const int64_t bytes = packed_bytes(args.head_dim, args.v_bits), slot = chunk.slot + position;
  const uint8_t* const row = args.v_codes + slot * bytes;
  const uint32_t zero = args.v_zero[slot];
  if (args.v_bits == 2)
    unpack_value<2>(row, bytes, w.plane, zero, out);
  else if (args.v_bits <= 4)
    unpack_value<4>(row, bytes, w.plane, zero, out);
  else
    unpack_value<8>(row, bytes, w.plane, zero, out);
}

class FloatProducts {
 public:
  static int64_t bytes(const Workspace& w) {
    const int64_t positions = w.block > kGroup ? kChunk : kSpan;
    return (w.block * w.depth + kGroup * kChunk + positions * (w.depth + w.value_width)) *
           kFloatBytes;
  }

  FloatProducts(const AttentionDecode& args, const Workspace& w)
      : args_(args), w_(w), shared_(w.block > kGroup) {
    queries_ = reinterpret_cast<float*>(w.rest);
    low_ = queries_ + w.block * w.depth;
    keys_ = low_ + kGroup * kChunk;
    values_ = keys_ + (shared_ ? kChunk : kSpan) * w.depth;
  }

  void start(int64_t u, int64_t count) {
    widen_row(args_.q, args_.dtype, u * args_.head_dim, count * args_.head_dim, queries_);
  }

  void enter(const Chunk& chunk) {
    chunk_ = chunk;
    unpacked_keys_ = unpacked_values_ = 0;
  }

  // scores [rows, kChunk] = queries from `first` of the block on times keys.
  void score(int64_t first, int64_t rows, const Reach& reach) {
    for (int64_t span = reach.begin; span < reach.end; span += kSpan) {
      const int64_t tile = w_.depth * kLanes;
      const int64_t left = chunk_.count - span;
      const int64_t tiles = ((left < kSpan ? left : kSpan) + kLanes - 1) / kLanes;
      float* const keys = keys_ + (shared_ ? span * w_.depth : 0);
      if (needed(span, unpacked_keys_))
        for (int64_t t = 0; t < tiles; ++t)
          unpack_key_tile(args_, chunk_, span + t * kLanes, keys + t * tile);
      const int64_t d = args_.head_dim;
      multiply({queries_ + first * d, nullptr, d, keys, kLanes, tile, w_.scores + span, kChunk, d,
                false},
               rows, tiles);
    }
  }

  Weighed weigh(int64_t begin, int64_t stop, int64_t row, float max) {
    float* const weights = w_.scores + row * kChunk;
    const auto plain = [&](int64_t j, Floats a, Floats b) {
      a.store(weights + j);
      b.store(weights + j + kLanes);
    };
    float* const low = low_ + row * kChunk;
    const auto split = [&](int64_t j, Floats a, Floats b) {
      const Floats high_a = round_bf16(a), high_b = round_bf16(b);
      plain(j, high_a, high_b);
      round_bf16(a - high_a).store(low + j);
      round_bf16(b - high_b).store(low + j + kLanes);
    };
    return args_.dtype == Dtype::kBFloat16 ? weigh_row(w_, begin, stop, row, max, split)
                                           : weigh_row(w_, begin, stop, row, max, plain);
  }

  // chunk_sums [rows, value_width] = weights times values.
  void add(int64_t rows, const Reach& reach) {
    const int64_t width = w_.value_width;
    for (int64_t span = reach.begin; span < reach.end; span += kSpan) {
      const int64_t left = chunk_.count - span, positions = left < kSpan ? left : kSpan;
      float* const values = values_ + (shared_ ? span * width : 0);
      if (needed(span, unpacked_values_))
        for (int64_t j = 0; j < positions; ++j)
          unpack_value_row(args_, w_, chunk_, span + j, values + j * width);
      const float* const low = args_.dtype == Dtype::kBFloat16 ? low_ + span : nullptr;
      multiply({w_.scores + span, low, kChunk, values, width, kLanes, w_.chunk_sums, width,
                positions, span > reach.begin},
               rows, width / kLanes);
    }
  }

 private:
  // Must a span be unpacked? One group alone unpacks each in the same place.
  bool needed(int64_t span, uint32_t& unpacked) const {
    const uint32_t bit = 1u << (span / kSpan);
    const bool before = shared_ && (unpacked & bit) != 0;
    unpacked |= bit;
    return !before;
  }

  const AttentionDecode& args_;
  const Workspace& w_;
  const bool shared_;  // more than one group reads what is unpacked
  float *queries_, *low_, *keys_, *values_;
  Chunk chunk_{};
  uint32_t unpacked_keys_ = 0, unpacked_values_ = 0;
};

inline void attention_decode_body(const AttentionDecode& args, int64_t begin, int64_t end) {
  const Workspace w = Workspace::make<FloatProducts>(args, end - begin);
  FloatProducts products(args, w);
  in_blocks(args, w, begin, end, [&](int64_t u, int64_t count, int64_t head) {
    attend(args, w, products, u, count, head);
  });
}

inline void attention_parts_body(const AttentionParts& parts, int64_t begin, int64_t end) {
  const Workspace w = Workspace::make<FloatProducts>(parts.args, parts.queries);
  FloatProducts products(parts.args, w);
  by_head(parts, begin, end,
          [&](int64_t from, int64_t to) { attend_parts(parts, w, products, from, to); });
}

inline void attention_join_body(const AttentionParts& parts, int64_t head) {
  const Workspace w = Workspace::make<FloatProducts>(parts.args, parts.queries);
  start_joining(w, parts.queries);
  const int64_t first = head * parts.queries;
  for (int64_t q = 0; q < parts.queries; ++q) {
    for (int64_t chunk = 0; chunk < parts.chunks; ++chunk) {
      const float* const part = part_of(parts, w, first + q, chunk);
      join(w, q, {part[0], part[1]}, part + 2);
    }
    finish(parts.args, w, q, first + q);
  }
}
