// attention_decode for AMX, where T is bfloat16: both products of attention_body.h on the matrix
// unit, tdpbf16ps, whose order of additions is the one that is written there. Keys and values are
// unpacked as bfloat16, which holds code - zero exactly.
//
// tdpbf16ps takes subnormal numbers for 0 and rounds to them so. There are none in the scores if
// every number of q is 0 or at least 2^-100, and none in the sums of values if every scale is at
// least 2^-36: weights are then 0 or multiples of 2^-123. Blocks and chunks with smaller ones, and
// other types, are left to AVX-512.
#include "attention.h"
#include "lanes.h"
#include "scratch.h"
#include "tiles_amx.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "kv_unpack.h"

#include "attention_body.h"

#include "attention_products.h"

constexpr uint16_t kSmallestQuery = 27 << 7;               // 2^-100 in bfloat16
constexpr float kSmallestScale = 1.4551915228366852e-11f;  // 2^-36
constexpr int64_t kTileBytes = 1024;                       // 16 rows of 16 pairs
constexpr int64_t kPairs = kPart / 2;

// The bfloat16 of -16 .. 15.
struct Integers {
  alignas(64) uint16_t values[32] = {};

  constexpr Integers() {
    constexpr uint16_t kMagnitudes[] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
                                        0x4140, 0x4150, 0x4160, 0x4170, 0x4180};
    for (int i = 0; i < 32; ++i)
      values[i] = i < 16 ? kMagnitudes[16 - i] | 0x8000 : kMagnitudes[i - 16];
  }
};
constexpr Integers kIntegers;

constexpr uint16_t kHalfWords[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The lowest four bits of every half word, less a zero point, as bfloat16. offset: 16 - zero.
inline __m512i integers(__m512i codes, __m512i offset) {
  const __m512i index = _mm512_add_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(15)), offset);
  return _mm512_permutexvar_epi16(index, _mm512_load_si512(kIntegers.values));
}

inline __m512i low_and_high(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
}

inline __m512i offsets(Bits zero) {
  const __m512i offset = _mm512_sub_epi32(_mm512_set1_epi32(16), zero.v);
  return _mm512_or_si512(offset, _mm512_slli_epi32(offset, 16));
}

// Two rows of small integers as pairs of bfloat16, which holds them exactly.
inline void pair(const float* even, const float* odd, uint8_t* out) {
  const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(even), 16);
  _mm512_store_si512(out, low_and_high(low, _mm512_loadu_si512(odd)));
}

class TileProducts {
 public:
  static int64_t bytes(const Workspace& w) {
    const int64_t keys = w.block > kGroup ? kChunk : 2 * kSpan;
    const int64_t halves =
        w.block * w.depth + keys * w.depth + kChunk * w.value_width + 2 * kGroup * kChunk;
    return kTileBytes + halves * 2 + floats(w) * kFloatBytes + FloatProducts::bytes(w);
  }

  TileProducts(const AttentionDecode& args, const Workspace& w)
      : args_(args), w_(w), shared_(w.block > kGroup), plain_(args, w) {
    uint8_t* next = w.rest + FloatProducts::bytes(w);
    next += (kTileBytes - reinterpret_cast<uintptr_t>(next) % kTileBytes) % kTileBytes;
    const auto take = [&](int64_t size) {
      uint8_t* const found = next;
      next += size;
      return found;
    };
    keys_ = take((shared_ ? kChunk : 2 * kSpan) * w.depth * 2);
    values_ = take(kChunk * w.value_width * 2);
    high_ = reinterpret_cast<uint16_t*>(take(kGroup * kChunk * 2));
    low_ = reinterpret_cast<uint16_t*>(take(kGroup * kChunk * 2));
    queries_ = reinterpret_cast<uint16_t*>(take(w.block * w.depth * 2));
    floats_ = reinterpret_cast<float*>(take(floats(w) * kFloatBytes));
  }

  // May the matrix unit multiply these queries by keys? If not, plain() may.
  bool fits(int64_t u, int64_t count) const {
    const uint16_t* const q = query(u);
    uint16_t least = 0xffff;
    for (int64_t i = 0; i < count * args_.head_dim; ++i) {
      const uint16_t less = static_cast<uint16_t>((q[i] & 0x7fff) - 1);  // 0 is the largest
      least = less < least ? less : least;
    }
    return least >= kSmallestQuery - 1;
  }

  FloatProducts& plain() { return plain_; }

  void start(int64_t u, int64_t count) {
    const int64_t d = args_.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* const row = queries_ + i * w_.depth;
      __builtin_memcpy(row, query(u + i), static_cast<std::size_t>(d) * 2);
      for (int64_t j = d; j < w_.depth; ++j) row[j] = 0;
    }
  }

  void enter(const Chunk& chunk) {
    chunk_ = chunk;
    unpacked_keys_ = unpacked_values_ = 0;
    uint32_t small = 0;
    for (int64_t j = 0; j < chunk.count; ++j) small |= w_.value_scale[j] < kSmallestScale ? 1u : 0u;
    small_ = small != 0;
    if (small_) plain_.enter(chunk);
  }

  // Also of rows that are not there, which nobody reads.
  void score(int64_t first, int64_t, const Reach& reach) {
    const uint16_t* const queries = queries_ + first * w_.depth;
    const int64_t tile = w_.depth * kLanes * 2;
    unpack_keys_at(reach.begin);
    for (int64_t span = reach.begin; span < reach.end; span += kSpan) {
      // the next ones already, while the matrix unit is busy
      if (span + kSpan < reach.end) unpack_keys_at(span + kSpan);
      clear_sums();
      for (int64_t i = 0; i < w_.depth; i += kPart) {
        load_tile<4>(queries + i, w_.depth * 2);
        multiply_four<false>(keys_at(span) + i / kPart * kTileBytes, tile);
      }
      store_sums<4>(w_.scores + span, kChunk);
    }
  }

  Weighed weigh(int64_t begin, int64_t stop, int64_t row, float max) {
    if (small_) return plain_.weigh(begin, stop, row, max);
    uint16_t* const high = high_ + row * kChunk;
    uint16_t* const low = low_ + row * kChunk;
    // of every pair of half words the first is left out, the second one of the 16 in each half
    const __m512i spread =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kHalfWords)));
    const __m512i first = _mm512_slli_epi32(spread, 16);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16 << 16));
    const auto split = [&](int64_t j, Floats a, Floats b) __attribute__((always_inline)) {
      const __m512bh both = _mm512_cvtne2ps_pbh(b.v, a.v);
      __builtin_memcpy(high + j, &both, sizeof both);
      __m512i bits;
      __builtin_memcpy(&bits, &both, sizeof bits);
      const Floats high_a = Floats::of({_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, first, bits)});
      const Floats high_b = Floats::of({_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, second, bits)});
      const __m512bh rest = _mm512_cvtne2ps_pbh((b - high_b).v, (a - high_a).v);
      __builtin_memcpy(low + j, &rest, sizeof rest);
    };
    return weigh_row(w_, begin, stop, row, max, split);
  }

  void add(int64_t rows, const Reach& reach) {
    if (small_) return plain_.add(rows, reach);
    const int64_t tail = (chunk_.count + kPart - 1) / kPart * kPart;
    const int64_t stop = reach.end < tail ? reach.end : tail;
    int64_t column = 0;
    for (; column + 4 * kLanes <= w_.value_width; column += 4 * kLanes)
      add_columns<4>(reach.begin, stop, column);
    for (; column < w_.value_width; column += kLanes) add_columns<1>(reach.begin, stop, column);
  }

 private:
  static int64_t floats(const Workspace& w) {
    const int64_t key_tile = kLanes * w.depth, value_rows = 2 * w.value_width;
    return key_tile > value_rows ? key_tile : value_rows;
  }

  const uint16_t* query(int64_t u) const {
    return static_cast<const uint16_t*>(args_.q) + u * args_.head_dim;
  }

  static void clear_sums() {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
  }

  template <int kTiles>
  static void store_sums(float* out, int64_t stride) {
    store_tile<0>(out, stride * kFloatBytes);
    if constexpr (kTiles > 1) {
      store_tile<1>(out + kLanes, stride * kFloatBytes);
      store_tile<2>(out + 2 * kLanes, stride * kFloatBytes);
      store_tile<3>(out + 3 * kLanes, stride * kFloatBytes);
    }
  }

  // Tile 4, and if there are two tile 5, times a tile of pairs, added to the sums.
  template <bool kTwo, int kSums, int kRight>
  static void multiply_one(const uint8_t* pairs) {
    load_tile<kRight>(pairs, 64);
    multiply_bf16<kSums, 4, kRight>();
    if constexpr (kTwo) multiply_bf16<kSums, 5, kRight>();
  }

  template <bool kTwo>
  static void multiply_four(const uint8_t* pairs, int64_t tile) {
    multiply_one<kTwo, 0, 6>(pairs);
    multiply_one<kTwo, 1, 7>(pairs + tile);
    multiply_one<kTwo, 2, 6>(pairs + 2 * tile);
    multiply_one<kTwo, 3, 7>(pairs + 3 * tile);
  }

  template <int kTiles>
  void add_columns(int64_t begin, int64_t stop, int64_t column) {
    clear_sums();
    if (column == 0) unpack_values_at(begin);
    for (int64_t j = begin; j < stop; j += kPart) {
      if (column == 0 && j + kPart < stop) unpack_values_at(j + kPart);
      const uint8_t* const pairs = values_ + (j * w_.value_width + column * kPart) * 2;
      load_tile<4>(high_ + j, kChunk * 2);
      load_tile<5>(low_ + j, kChunk * 2);
      if constexpr (kTiles == 4)
        multiply_four<true>(pairs, kTileBytes);
      else
        multiply_one<true, 0, 6>(pairs);
    }
    store_sums<kTiles>(w_.chunk_sums + column, w_.value_width);
  }

  uint8_t* keys_at(int64_t span) const {
    return keys_ + (shared_ ? span : span % (2 * kSpan)) * w_.depth * 2;
  }

  void unpack_keys_at(int64_t span) {
    if (needed(span, unpacked_keys_))
      for (int64_t t = 0; t < kSpan && span + t < chunk_.count; t += kLanes)
        unpack_key_pairs(span + t, keys_at(span) + t * w_.depth * 2);
  }

  void unpack_values_at(int64_t part) {
    if (needed(part, unpacked_values_)) unpack_value_pairs(part);
  }

  // Keys of 16 positions from `first` on: [depth / 32] tiles.
  void unpack_key_pairs(int64_t first, uint8_t* out) {
    const int64_t d = args_.head_dim;
    if (code_width(args_.k_bits) == 4 && d % 64 == 0) return unpack_key_nibbles(first, out);
    unpack_key_tile(args_, chunk_, first, floats_);
    for (int64_t i = d * kLanes; i < w_.depth * kLanes; ++i) floats_[i] = 0.0f;
    for (int64_t i = 0; i < w_.depth; i += 2, out += 64)
      pair(floats_ + i * kLanes, floats_ + (i + 1) * kLanes, out);
  }

  void unpack_key_nibbles(int64_t first, uint8_t* out) {
    KeyRows keys(args_, chunk_, first);
    const __m512i offset = offsets(keys.zero);
    alignas(64) uint32_t words[kWordGroup][kLanes];
    for (int64_t byte = 0; byte < keys.bytes; byte += kWordGroup * kWordBytes) {
      transpose_words(keys.rows, byte, keys.bytes, words);
      for (int64_t w = 0; w < kWordGroup; ++w, out += 256) {
        const __m512i x = _mm512_load_si512(words[w]);
        const auto put = [&](int i, __m512i low, __m512i high) {
          _mm512_store_si512(out + 64 * i, integers(low_and_high(low, high), offset));
        };
        put(0, x, _mm512_slli_epi32(x, 12));
        put(1, _mm512_srli_epi32(x, 8), _mm512_slli_epi32(x, 4));
        put(2, _mm512_srli_epi32(x, 16), _mm512_srli_epi32(x, 4));
        put(3, _mm512_srli_epi32(x, 24), _mm512_srli_epi32(x, 12));
      }
    }
  }

  // Values of 32 positions from `first` on: [value_width / 16] tiles; zeros past the last one.
  void unpack_value_pairs(int64_t first) {
    uint8_t* const out = values_ + first * w_.value_width * 2;
    const int64_t width = w_.value_width;
    const bool nibbles = code_width(args_.v_bits) == 4 && args_.head_dim % 32 == 0;
    for (int64_t i = 0; i < kPairs; ++i) {
      const int64_t position = first + 2 * i;
      if (nibbles && position + 2 <= chunk_.count) {
        unpack_value_nibbles(position, out + i * 64);
        continue;
      }
      for (int64_t r = 0; r < 2; ++r)
        if (position + r < chunk_.count)
          unpack_value_row(args_, w_, chunk_, position + r, floats_ + r * width);
        else
          for (int64_t c = 0; c < width; ++c) floats_[r * width + c] = 0.0f;
      for (int64_t c = 0; c < width; c += kLanes)
        pair(floats_ + c, floats_ + width + c, out + i * 64 + c / kLanes * kTileBytes);
    }
  }

  void unpack_value_nibbles(int64_t position, uint8_t* out) {
    const int64_t bytes = args_.head_dim / 2, slot = chunk_.slot + position;
    const uint8_t* const row = args_.v_codes + slot * bytes;
    const uint32_t offset = (16u - args_.v_zero[slot]) | (16u - args_.v_zero[slot + 1]) << 16;
    const __m512i offsets = _mm512_set1_epi32(static_cast<int>(offset));
    for (int64_t b = 0; b < bytes; b += kLanes, out += kTileBytes) {
      const Bits both = Bits::widen(row + b) | Bits::widen(row + bytes + b).left<16>();
      _mm512_store_si512(out, integers(both.v, offsets));
      _mm512_store_si512(out + bytes / kLanes * kTileBytes, integers(both.right<4>().v, offsets));
    }
  }

  bool needed(int64_t position, uint32_t& unpacked) const {
    const uint32_t bit = 1u << (position / kPart);
    const bool before = shared_ && (unpacked & bit) != 0;
    unpacked |= bit;
    return !before;
  }

  const AttentionDecode& args_;
  const Workspace& w_;
  const bool shared_;  // more than one group reads what is unpacked
  FloatProducts plain_;
  uint8_t *keys_, *values_;  // pairs: [kChunk or two spans, depth], [kChunk, value_width]
  uint16_t *high_, *low_;    // weights [kGroup, kChunk]
  uint16_t* queries_;        // [block, depth]
  float* floats_;            // a tile of keys, or two rows of values
  Chunk chunk_{};
  uint32_t unpacked_keys_ = 0, unpacked_values_ = 0;
  bool small_ = false;  // some scale of the chunk is too small
};

}  // namespace

void attention_decode_amx(const AttentionDecode& args, int64_t begin, int64_t end) {
  if (args.dtype != Dtype::kBFloat16) return attention_decode_avx512(args, begin, end);
  const Workspace w = Workspace::make<TileProducts>(args, end - begin);
  TileProducts products(args, w);
  const int64_t rows = end - begin < kGroup ? end - begin : kGroup;
  const TileSession session({rows, 64}, {rows, 64}, {kPairs, 64});
  in_blocks(args, w, begin, end, [&](int64_t u, int64_t count, int64_t head) {
    if (products.fits(u, count))
      attend(args, w, products, u, count, head);
    else
      attend(args, w, products.plain(), u, count, head);
  });
}

void attention_parts_amx(const AttentionParts& parts, int64_t begin, int64_t end) {
  if (parts.args.dtype != Dtype::kBFloat16) return attention_parts_avx512(parts, begin, end);
  const Workspace w = Workspace::make<TileProducts>(parts.args, parts.queries);
  TileProducts products(parts.args, w);
  const int64_t rows = parts.queries < kGroup ? parts.queries : kGroup;
  const TileSession session({rows, 64}, {rows, 64}, {kPairs, 64});
  by_head(parts, begin, end, [&](int64_t from, int64_t to) {
    if (products.fits(from / parts.chunks * parts.queries, parts.queries))
      attend_parts(parts, w, products, from, to);
    else
      attend_parts(parts, w, products.plain(), from, to);
  });
}

}  // namespace fq::cpu
