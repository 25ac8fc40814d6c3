// The shared row quantizer (csrc/cuda/row_quantize.cuh) against the contract (csrc/contract.h), by
// trying. Prints what differs and how many numbers were tried; exits with 1 if anything differs.
// Argument: how many million random divisions.
#include "../../csrc/cuda/row_quantize.cuh"

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

namespace {

using namespace fq;
using namespace fq::cuda;

int64_t tried = 0, wrong = 0;

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  uint32_t below(uint32_t end) { return static_cast<uint32_t>((next() >> 32) * end >> 32); }
};

// 8 bits with the zero point in the middle or at an end: codes less the zero point of -255..255.
constexpr Grid kWidest{8, false, false, Layout::kPacked};

void check(const RowCoder& c, float x) {
  const float lo = static_cast<float>(-c.zero), hi = static_cast<float>(255 - c.zero);
  const int32_t want = code(x, c.scale, lo, hi, 0);
  const int32_t got = static_cast<int32_t>(rounded_bits(c, x) - kRounderBits);
  ++tried;
  if (want != got && ++wrong <= 20)
    std::printf("x = %a, scale = %a: %d, must be %d\n", x, c.scale, got, want);
}

void check_around(const RowCoder& c, float x) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float near : {std::nextafterf(x, -inf), x, std::nextafterf(x, inf)}) {
    check(c, near);
    check(c, -near);
  }
}

// The claim about `rest`, for every mantissa of a divisor.
void every_rest() {
  for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    const float scale = float_of(0x3f000000u | mantissa);  // 0.5 to 1
    const RowCoder c = coder_of(kWidest, scale, 0);
    const float want = fma(-scale, c.inverse, 1.0f) / scale;
    ++tried;
    if (want != c.rest && ++wrong <= 20)
      std::printf("rest of %a: %a, must be %a\n", scale, c.rest, want);
  }
}

// Part 2 of the argument: divisors B within 4 of a multiple of 2^(23 - j), every half-integer in
// [2^j, 2^(j + 1)), its two neighbours' midpoints m, x around m B. (j = -1 has the multiples 2^23
// and 2^24.) At several exponents, the ends among them.
void every_hard_division() {
  for (int j = -1; j < 8; ++j) {
    const int64_t step = int64_t{1} << (j < 0 ? 23 : 23 - j);
    for (int64_t multiple = 1 << 23; multiple <= 1 << 24; multiple += step)
      for (int64_t b = multiple - 4; b <= multiple + 4; ++b) {
        if (b < 1 << 23 || b >= 1 << 24) continue;
        for (const int exponent : {-149, -148, -90, -24, -23, 0, 41, 73, 96, 104}) {
          const float scale = std::ldexp(static_cast<float>(b), exponent);
          const RowCoder positive = coder_of(kWidest, scale, 0);
          const RowCoder negative = coder_of(kWidest, scale, 255);
          const int first = j < 0 ? 1 : 2 << j;
          for (int twice = first + (first % 2 == 0); twice < 4 << j || (j < 0 && twice == 1);
               twice += 2) {
            const double c = twice / 2.0, half = std::ldexp(1.0, j - 24);
            for (const double m : {c - half, c, c + half}) {
              const double x = std::ldexp(m * static_cast<double>(b), exponent);
              if (x > std::numeric_limits<float>::max()) continue;
              check_around(positive, static_cast<float>(x));
              check_around(negative, static_cast<float>(x));
            }
          }
        }
      }
  }
}

void random_divisions(int64_t count) {
  Random random;
  for (int64_t i = 0; i < count;) {
    // Any normal float, but most of them near 1; powers of two and their neighbours more often.
    uint32_t exponent = random.below(4) ? 120 + random.below(14) : 1 + random.below(254);
    uint32_t mantissa = random.next() & 0x7fffff;
    if (random.below(8) == 0) mantissa = (random.below(9) - 4) & 0x7fffff;
    const float scale = float_of(exponent << 23 | mantissa);
    const int32_t zeros[] = {0, 128, 255};
    const RowCoder c = coder_of(kWidest, scale, zeros[random.below(3)]);
    for (int j = 0; j < 64; ++j, ++i) {
      uint32_t bits = random.next();
      if (j % 8 != 0) {  // near a half-integer multiple of the scale
        const double x = (random.below(1100) * 0.5 - 275) * static_cast<double>(scale);
        bits = bits_of(static_cast<float>(x)) + random.below(9) - 4;
      }
      const float x = float_of(bits);
      if (is_finite(x)) check(c, x);
    }
  }
}

// ---- whole rows ---------------------------------------------------------------------------------

template <int kCodes>
void check_stored(const Grid& grid, const RowCoder& c, const float* x) {
  alignas(16) uint8_t got[32];
  const bool bytes = codes_are_bytes(grid);
  store_codes<kCodes>(c, bytes, x, got);
  for (int i = 0; i < kCodes; ++i) {
    const int32_t want = grid.symmetric ? symmetric_code(x[i], c.scale, grid.bits, grid.narrow)
                                        : asymmetric_code(x[i], c.scale, c.zero, grid.bits);
    const int32_t field = bytes ? got[i] : nibble(got[i / 2], i);
    ++tried;
    if (field != (want & (bytes ? 255 : 15)) && ++wrong <= 20)
      std::printf("%d bits, symmetric %d, %d codes: x = %a, scale = %a: %d, must be %d\n",
                  grid.bits, grid.symmetric, kCodes, x[i], c.scale, field, want);
  }
}

void check_scale(const Grid& grid, const RowCoder& c, const float* x, Clip clip) {
  float most = 0, least = 0;
  bool finite = true;
  for (int i = 0; i < 32; ++i) {
    finite = finite && is_finite(x[i]);
    most = x[i] > most ? x[i] : most;
    least = x[i] < least ? x[i] : least;
  }
  if (!finite) most = quiet_nan();
  ScaleZero want{symmetric_scale(most, least, clip.max, clip.min, grid.bits), 0};
  if (!grid.symmetric) want = asymmetric_scale(most, least, clip.max, clip.min, grid.bits);
  ++tried;
  if ((bits_of(want.scale) != bits_of(c.scale) || want.zero != c.zero) && ++wrong <= 20)
    std::printf("%d bits, symmetric %d: scale %a, zero %d, must be %a, %d\n", grid.bits,
                grid.symmetric, c.scale, c.zero, want.scale, want.zero);
}

template <Dtype kType>
void check_pairs(const uint16_t* x, LaneRange want) {
  PairRange<kType> pairs;
  for (int i = 0; i < 32; i += 2) pairs.add(x[i] | uint32_t{x[i + 1]} << 16);
  const LaneRange got = pairs.range();
  const bool bad = !is_finite(want.max()) || !is_finite(want.min());
  const bool same = bad ? !is_finite(got.max()) || !is_finite(got.min())
                        : got.above == want.above && got.below == want.below;
  ++tried;
  if (!same && ++wrong <= 20)
    std::printf("range %a..%a, must be %a..%a\n", got.min(), got.max(), want.min(), want.max());
}

void random_rows(int count) {
  Random random;
  const float inf = std::numeric_limits<float>::infinity();
  const float clips[] = {1, 1, 0.9f, 0.75f, 0, 1e-30f, 1e30f, -1, inf, quiet_nan()};
  const float specials[] = {0,      -0.0f, inf,    -inf,           quiet_nan(), -quiet_nan(),
                            1e-40f, 3e38f, -3e38f, 1.17549435e-38f};
  for (int n = 0; n < count; ++n) {
    float x[32];
    uint16_t halves[2][32];
    const uint32_t kind = random.below(8), size = 100 + random.below(54);
    for (int i = 0; i < 32; ++i) {
      x[i] = float_of((size + random.below(4)) << 23 | (random.next() & 0x807fffff));
      if (kind == 1) x[i] = std::fabs(x[i]);
      if (kind == 2) x[i] = -std::fabs(x[i]);
      if (kind == 3) x[i] = 0;
      if (kind == 4) x[i] = float_of(static_cast<uint32_t>(random.next()));
    }
    if (kind == 5) x[random.below(32)] = specials[random.below(10)];
    const int rounding = static_cast<int>(random.below(3));
    LaneRange range;
    for (int i = 0; i < 32; ++i) {
      x[i] = round_to(static_cast<Dtype>(rounding), x[i]);
      halves[0][i] = float_to_bf16(x[i]);
      halves[1][i] = float_to_fp16(x[i]);
      range.add(x[i]);
    }
    if (rounding == 1) check_pairs<Dtype::kBFloat16>(halves[0], range);
    if (rounding == 2) check_pairs<Dtype::kFloat16>(halves[1], range);

    const uint32_t form = random.below(4);
    const Grid grid{2 + static_cast<int32_t>(random.below(7)), form != 0, form == 1,
                    random.below(2) ? Layout::kPacked : Layout::kBytes};
    const Clip clip{clips[random.below(n % 4 ? 4 : 10)], clips[random.below(n % 4 ? 4 : 10)]};
    const RowCoder c = row_coder(grid, range, clip);
    check_scale(grid, c, x, clip);
    check_stored<2>(grid, c, x);
    check_stored<4>(grid, c, x);
    check_stored<8>(grid, c, x);
    check_stored<16>(grid, c, x);
    check_stored<32>(grid, c, x);
  }
}

}  // namespace

int main(int arguments, char** argument) {
  const int64_t millions = arguments > 1 ? std::atoll(argument[1]) : 30;
  every_rest();
  every_hard_division();
  random_divisions(millions * 1000000);
  random_rows(200000);
  std::printf("%lld tried, %lld wrong\n", static_cast<long long>(tried),
              static_cast<long long>(wrong));
  return wrong != 0;
}
