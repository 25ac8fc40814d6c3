// kronecker and kronecker_quantize for AMX, where T is bfloat16: both products on the matrix unit,
// tdpbf16ps, whose order of additions is the one of kronecker_body.h.
//
// Some tokens go through together, one stage after the other, because a matrix unit's answer takes
// its time. Of each, left times X gives S; the rows of S, rounded to bfloat16, are stacked on those
// of the others, and all of them times right give Y.
//
//   A    [rows, depth] bfloat16, depth in whole parts of 32: left, S
//   B    tiles of 32 x 16, as pairs of bfloat16 (even k, odd k): X, right
//
// tdpbf16ps takes subnormal numbers for 0 and rounds to them so. There are none if the exponents of
// the smallest numbers of x, left and right, zeros aside, add up to -105 or more: every product
// then is a multiple of 2^-126. A token with smaller ones is left to AVX-512, and so are other
// types.
#include "kronecker.h"

#include "lanes.h"
#include "scratch.h"
#include "tiles_amx.h"

namespace fq::cpu {
namespace {

constexpr int kTileRows = 8;

#include "row_body.h"

#include "row_codes.h"

#include "kronecker_body.h"

constexpr int64_t kTileBytes = 1024, kTileSide = 16;
constexpr int64_t kBatchBytes = 40 << 10;  // of tokens that go through together: in the L1 cache
constexpr int64_t kMostTokens = 64;
constexpr int kLeastExponents = -105;
constexpr uint16_t kNothing = 0xffff;  // the least magnitude of nothing but zeros, less 1

int64_t longer(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

__m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1);
}

__m256i load_halves(const uint16_t* p, int64_t count) {
  return count >= kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                         : _mm256_maskz_loadu_epi16(first_lanes(count), p);
}

// Pairs of two rows, `count` columns of them; a missing row is zeros.
__m512i pairs(const uint16_t* even, const uint16_t* odd, int64_t count) {
  const __m512i low = _mm512_cvtepu16_epi32(load_halves(even, count));
  if (odd == nullptr) return low;
  const __m512i high = _mm512_cvtepu16_epi32(load_halves(odd, count));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// x [rows, columns] as tiles [depth / 32][columns / 16] of pairs; rows of tiles past the last one
// are left alone.
void make_tiles(const uint16_t* x, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t across = whole(columns, kTileSide) / kTileSide;
  for (int64_t i = 0; i < rows; i += 2) {
    uint8_t* row = out + i / kPart * across * kTileBytes + i % kPart * 32;
    const uint16_t* const even = x + i * columns;
    const uint16_t* const odd = i + 1 < rows ? even + columns : nullptr;
    for (int64_t j = 0; j < columns; j += kTileSide, row += kTileBytes)
      _mm512_store_si512(row, pairs(even + j, odd ? odd + j : odd, columns - j));
  }
}

// The smallest magnitude of bfloat16 numbers but 0, less 1.
uint16_t least_of(const uint16_t* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  __m512i least = _mm512_set1_epi16(-1);
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + j), magnitude);
    least = _mm512_min_epu16(least, _mm512_sub_epi16(bits, one));
  }
  uint16_t lanes[32], found = kNothing;
  _mm512_storeu_si512(lanes, least);
  for (uint16_t lane : lanes) found = lane < found ? lane : found;
  for (; j < count; ++j) {
    const uint16_t less = static_cast<uint16_t>((x[j] & 0x7fff) - 1);
    found = less < found ? less : found;
  }
  return found;
}

// Its exponent, at most 0: a larger one helps nobody.
int exponent_of(uint16_t least) {
  const int exponent = (least == kNothing ? 127 : (least + 1) >> 7) - 127;
  return exponent < 0 ? exponent : 0;
}

// silu(g) in the bits of contract.h, for |g| < 86: 2^n needs only one factor there. That the
// quotient is the correctly rounded one is tested for every bfloat16 number g.
inline __attribute__((always_inline)) Floats silu_of_small(Floats g) {
  const Floats magic = Floats::splat(12582912.0f);
  const Floats t = zeros() - g;
  const Floats shifted = fma(t, Floats::splat(1.44269504088896341f), magic);
  const Floats n = shifted - magic;
  Floats r = fma(n, Floats::splat(-0.693359375f), t);
  r = fma(n, Floats::splat(2.12194440e-4f), r);
  Floats p = Floats::splat(1.98412698e-4f);
  p = fma(p, r, Floats::splat(1.38888889e-3f));
  p = fma(p, r, Floats::splat(8.33333333e-3f));
  p = fma(p, r, Floats::splat(4.16666667e-2f));
  p = fma(p, r, Floats::splat(1.66666667e-1f));
  p = fma(p, r, Floats::splat(0.5f));
  p = fma(p * r, r, r) + Floats::splat(1.0f);
  const Floats power = Floats::of(shifted.bits().left<23>() + Bits::splat(bits_of(1.0f)));
  const Floats y = fma(p, power, Floats::splat(1.0f));
  const Floats near = {_mm512_rcp14_ps(y.v)};
  const Floats inverse = fma(near, {_mm512_fnmadd_ps(y.v, near.v, _mm512_set1_ps(1.0f))}, near);
  const Floats quotient = g * inverse;
  return fma({_mm512_fnmadd_ps(quotient.v, y.v, g.v)}, inverse, quotient);
}

inline __attribute__((always_inline)) Floats silu(Floats g) {
  const __m512 magnitude = _mm512_abs_ps(g.v);
  if (_mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(86.0f), _CMP_NLT_UQ) == 0)
    return silu_of_small(g);
  float lanes[kLanes];
  g.store(lanes);
  for (float& lane : lanes) lane = fq::silu(lane);
  return Floats::load(lanes);
}

struct Sizes {
  int64_t n1, n2, k;
  int64_t depth1, depth2;  // n1 and n2 in whole parts
  int64_t across;          // tiles across n2
  int64_t batch;           // tokens at a time

  explicit Sizes(const Transform& t, int64_t rows) : n1(t.n1), n2(t.n2), k(t.n1 * t.n2) {
    depth1 = whole(n1, kPart);
    depth2 = whole(n2, kPart);
    across = whole(n2, kTileSide) / kTileSide;
    const int64_t sums = t.left ? whole(n1, kTileSide) * across * kTileSide * 4 : 0;
    const int64_t pairs = t.left ? depth1 * across * 32 : 0;
    const int64_t fit = kBatchBytes / (sums + pairs + n1 * depth2 * 2 + k * 4);
    batch = fit < kMostTokens ? fit : kMostTokens;
    batch = batch < rows ? batch : rows;
    batch = batch > 1 ? batch : 1;
  }
};

// The factors of a call, packed, and the tokens that go through together.
class Batch {
 public:
  static int64_t bytes(const Transform& t, const Sizes& s) { return Batch(t, s, nullptr).end_; }

  Batch(const Transform& t, const Sizes& s, uint8_t* memory) : t_(t), s_(s), memory_(memory) {
    const int64_t rows = whole(s.batch * s.n1, kTileSide);
    const int64_t widest = longer(s.n1, s.n2);
    left_ = take<uint16_t>(whole(s.n1, kTileSide) * s.depth1);
    right_ = take<uint8_t>(s.depth2 * s.across * 32);
    x_ = take<uint8_t>(s.batch * s.depth1 * s.across * 32);
    factor_ = take<uint16_t>(widest * widest);
    v_ = take<uint16_t>(s.k + 32);
    sums_ = take<float>(s.batch * sums_size());
    stacked_ = take<uint16_t>(rows * s.depth2);
    y_ = take<float>(longer(rows * s.n2 + 2 * kTileSide, widest * widest));
    small_ = take<bool>(s.batch);
    squares_ = take<float>(s.batch);
    plain_ = take<float>(work_floats(t));
  }

  // Packs the factors.
  void prepare() {
    if (t_.left) {
      clear(x_, s_.batch * s_.depth1 * s_.across * 32);
      const uint16_t* const left = narrow(t_.left, t_.left_dtype, s_.n1);
      clear(left_, whole(s_.n1, kTileSide) * s_.depth1 * 2);
      for (int64_t i = 0; i < s_.n1; ++i)
        __builtin_memcpy(left_ + i * s_.depth1, left + i * s_.n1,
                         static_cast<std::size_t>(s_.n1 * 2));
    }
    if (t_.right) {
      clear(right_, s_.depth2 * s_.across * 32);
      make_tiles(narrow(t_.right, t_.right_dtype, s_.n2), s_.n2, s_.n2, right_);
    }
  }

  // The next `count` tokens of x, from `first` on.
  void transform(const void* x, const void* gate, bool rms, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t* row = static_cast<const uint16_t*>(x) + (first + i) * s_.k;
      if (gate || t_.channel_scale) {
        const uint16_t* const gates = static_cast<const uint16_t*>(gate) + (first + i) * s_.k;
        if (gate) row = turn_on(row, gates);
        if (rms) squares_[i] = squares_of(row);
        if (t_.channel_scale) row = scale(row, t_.channel_scale);
      } else if (rms) {
        squares_[i] = squares_of(row);
      }
      small_[i] = exponent_of(least_of(row, s_.k)) + exponents_ < kLeastExponents;
      if (t_.left)
        make_tiles(row, s_.n1, s_.n2, x_ + i * s_.depth1 * s_.across * 32);
      else
        stack(row, i);
    }
    if (t_.left) {
      for (int64_t i = 0; i < count; ++i) multiply_left(i);
      for (int64_t i = 0; i < count; ++i) round_sums(i);
    }
    if (t_.right)
      multiply_right(count * s_.n1);
    else
      for (int64_t i = 0; i < count * s_.n1; ++i)
        widen_row(stacked_, Dtype::kBFloat16, i * s_.depth2, s_.n2, y_ + i * s_.n2);
  }

  // Of the tokens of the last transform. small: y is not to be used.
  bool small(int64_t token) const { return small_[token]; }
  float squares(int64_t token) const { return squares_[token]; }
  const float* y(int64_t token) const { return y_ + token * s_.k; }
  float* plain_work() const { return plain_; }
  uint8_t* codes() const { return reinterpret_cast<uint8_t*>(v_); }  // free then, k + 1 bytes

 private:
  // Of one token: whole tiles.
  int64_t sums_size() const { return whole(s_.n1, kTileSide) * s_.across * kTileSide; }

  template <class T>
  T* take(int64_t count) {
    const uintptr_t found = reinterpret_cast<uintptr_t>(memory_) + static_cast<uintptr_t>(end_);
    end_ += whole(count * int64_t{sizeof(T)}, 64);
    return reinterpret_cast<T*>(found);
  }

  static void clear(void* p, int64_t bytes) {
    __builtin_memset(p, 0, static_cast<std::size_t>(bytes));
  }

  const uint16_t* narrow(const void* factor, Dtype dtype, int64_t n) {
    const uint16_t* out = static_cast<const uint16_t*>(factor);
    if (dtype != Dtype::kBFloat16) {
      out = factor_;
      widen_row(factor, dtype, 0, n * n, y_);
      narrow_row(y_, Dtype::kBFloat16, 0, n * n, factor_);
    }
    exponents_ += exponent_of(least_of(out, n * n));
    return out;
  }

  // v = round_T(f(row)), 32 elements at a time.
  template <class F>
  const uint16_t* map(const uint16_t* row, F f) {
    for (int64_t j = 0; j < s_.k; j += 32) {
      const Floats a = f(j, Floats{widen(load_halves(row + j, s_.k - j))});
      const int64_t left = s_.k - j - kLanes;
      const Floats b = left > 0 ? f(j + kLanes, {widen(load_halves(row + j + kLanes, left))}) : a;
      const __m512bh both = _mm512_cvtne2ps_pbh(b.v, a.v);
      __builtin_memcpy(v_ + j, &both, sizeof both);
    }
    return v_;
  }

  const uint16_t* turn_on(const uint16_t* row, const uint16_t* gate) {
    return map(row, [&](int64_t j, Floats x) {
      return silu({widen(load_halves(gate + j, s_.k - j))}) * x;
    });
  }

  const uint16_t* scale(const uint16_t* row, const float* scales) {
    return map(row, [&](int64_t j, Floats x) {
      const __m512 c = _mm512_maskz_loadu_ps(first_lanes(s_.k - j), scales + j);
      return x * Floats{c};
    });
  }

  // As sum_of_squares of row_body.h.
  float squares_of(const uint16_t* row) const {
    Floats sum = zeros();
    for (int64_t j = 0; j < s_.k; j += kLanes) {
      const Floats x = {widen(load_halves(row + j, s_.k - j))};
      sum = fma(x, x, sum);
    }
    return sum.sum();
  }

  // Two tiles of A by two of B: sums 0 and 1 are of the first rows, 2 and 3 of the next ones. The
  // second ones may be missing.
  static void multiply(const uint16_t* a, int64_t depth, bool two_rows, const uint8_t* b,
                       int64_t across, bool two_columns) {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
    for (int64_t k = 0; k < depth; k += kPart, b += across * kTileBytes) {
      load_tile<4>(a + k, depth * 2);
      load_tile<6>(b, 64);
      multiply_bf16<0, 4, 6>();
      if (two_columns) {
        load_tile<7>(b + kTileBytes, 64);
        multiply_bf16<1, 4, 7>();
      }
      if (!two_rows) continue;
      load_tile<5>(a + kTileSide * depth + k, depth * 2);
      multiply_bf16<2, 5, 6>();
      if (two_columns) multiply_bf16<3, 5, 7>();
    }
  }

  // The later ones first: where a tile is wider than the rest of its row, what it leaves in the
  // next one is overwritten.
  static void store(float* out, int64_t stride, bool two_rows, bool two_columns) {
    if (two_columns) store_tile<1>(out + kTileSide, stride * 4);
    store_tile<0>(out, stride * 4);
    if (!two_rows) return;
    float* const below = out + kTileSide * stride;
    if (two_columns) store_tile<3>(below + kTileSide, stride * 4);
    store_tile<2>(below, stride * 4);
  }

  // Sums of one token = left X.
  void multiply_left(int64_t token) {
    const uint8_t* const x = x_ + token * s_.depth1 * s_.across * 32;
    float* const sums = sums_ + token * sums_size();
    for (int64_t i = 0; i < s_.n1; i += 2 * kTileSide)
      for (int64_t c = 0; c < s_.across; c += 2) {
        const bool two_rows = i + kTileSide < s_.n1, two_columns = c + 1 < s_.across;
        multiply(left_ + i * s_.depth1, s_.depth1, two_rows, x + c * kTileBytes, s_.across,
                 two_columns);
        const int64_t stride = s_.across * kTileSide;
        store(sums + i * stride + c * kTileSide, stride, two_rows, two_columns);
      }
  }

  // Its rows of S.
  void round_sums(int64_t token) {
    const float* sum = sums_ + token * sums_size();
    uint16_t* out = stacked_ + token * s_.n1 * s_.depth2;
    const int64_t width = s_.across * kTileSide;
    for (int64_t i = 0; i < s_.n1; ++i, sum += width)
      for (int64_t j = 0; j < width; j += 2 * kTileSide, out += 32) {
        const __m512 a = _mm512_loadu_ps(sum + j);
        const bool two = j + kTileSide < width;
        const __m512 b = two ? _mm512_loadu_ps(sum + j + kTileSide) : _mm512_setzero_ps();
        const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
        __builtin_memcpy(out, &both, sizeof both);
      }
  }

  // Rows of a token as they are: S where there is no left factor.
  void stack(const uint16_t* row, int64_t token) {
    uint16_t* out = stacked_ + token * s_.n1 * s_.depth2;
    for (int64_t j = 0; j < s_.n1; ++j, row += s_.n2, out += s_.depth2) {
      __builtin_memcpy(out, row, static_cast<std::size_t>(s_.n2 * 2));
      for (int64_t c = s_.n2; c < s_.depth2; ++c) out[c] = 0;
    }
  }

  // Y of all tokens.
  void multiply_right(int64_t rows) {
    for (int64_t i = 0; i < rows; i += 2 * kTileSide)
      for (int64_t c = (s_.across - 1) / 2 * 2; c >= 0; c -= 2) {
        const bool two_rows = i + kTileSide < rows, two_columns = c + 1 < s_.across;
        multiply(stacked_ + i * s_.depth2, s_.depth2, two_rows, right_ + c * kTileBytes, s_.across,
                 two_columns);
        store(y_ + i * s_.n2 + c * kTileSide, s_.n2, two_rows, two_columns);
      }
  }

  const Transform& t_;
  const Sizes s_;
  uint8_t* const memory_;
  int64_t end_ = 0;
  int exponents_ = 0;              // of the factors' smallest numbers
  uint16_t *left_, *factor_, *v_;  // [n1 in whole tiles, depth1]; a factor in T; one token
  uint8_t *right_, *x_;            // tiles of pairs
  float* sums_;                    // [batch, n1 and n2 in whole tiles]
  uint16_t* stacked_;              // [batch * n1 in whole tiles, depth2]: S
  float *y_, *squares_;            // [batch * n1 in whole tiles, n2]; [batch]
  bool* small_;                    // [batch]
  float* plain_;                   // what AVX-512 works with
};

// Calls f(batch, i) for every token i of a batch, counted from `first` on, after its transform.
template <class Args, class F>
void in_batches(const Args& args, const void* gate, bool rms, int64_t begin, int64_t end, F f) {
  const Sizes sizes(args.transform, end - begin);
  void* const memory = scratch(Batch::bytes(args.transform, sizes));
  Batch batch(args.transform, sizes, static_cast<uint8_t*>(memory));
  batch.prepare();
  const TileSession session({kTileSide, 64}, {kTileSide, 64}, {kTileSide, 64});
  for (int64_t first = begin; first < end; first += sizes.batch) {
    const int64_t count = end - first < sizes.batch ? end - first : sizes.batch;
    batch.transform(args.x, gate, rms, first, count);
    for (int64_t i = 0; i < count; ++i) f(batch, first, i);
  }
}

bool suits(const Transform& t, Dtype dtype) {
  return dtype == Dtype::kBFloat16 && (t.left || t.right);
}

}  // namespace

void kronecker_amx(const Kronecker& args, int64_t begin, int64_t end, float* work) {
  if (!suits(args.transform, args.dtype)) return kronecker_avx512(args, begin, end, work);
  in_batches(args, nullptr, false, begin, end, [&](const Batch& batch, int64_t first, int64_t i) {
    const int64_t row = first + i;
    if (batch.small(i))
      kronecker_avx512(args, row, row + 1, batch.plain_work());
    else
      narrow_row(batch.y(i), args.out_dtype, row * args.k, args.k, args.out);
  });
}

void kronecker_quantize_amx(const KroneckerQuantize& args, int64_t begin, int64_t end,
                            float* work) {
  if (!suits(args.transform, args.dtype)) return kronecker_quantize_avx512(args, begin, end, work);
  in_batches(args, args.gate, args.rms, begin, end,
             [&](const Batch& batch, int64_t first, int64_t i) {
               const int64_t row = first + i;
               if (batch.small(i))
                 kronecker_quantize_avx512(args, row, row + 1, batch.plain_work());
               else
                 quantize_transformed(args, row, batch.y(i), batch.squares(i), batch.codes());
             });
}

}  // namespace fq::cpu
