// Sixteen floats at a time, on any instruction set: one AVX-512 register, two AVX registers or an
// array. Every operation is one IEEE operation per lane, so a kernel written with them gives the
// same bits in every file that compiles it. larger(a, b) is a > b ? a : b: b if one is NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../contract.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
// GCC 12 takes its own _mm512_undefined_* for an uninitialized variable (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

using fq::fma;  // next to the one for sixteen floats

constexpr int kLanes = 16;

#define FQ_LANES static inline __attribute__((always_inline))

#if defined(__AVX512F__)

struct Floats {
  __m512 v;

  FQ_LANES Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FQ_LANES Floats splat(float x) { return {_mm512_set1_ps(x)}; }
  // float((words[lane] >> shift) & mask)
  FQ_LANES Floats field(const uint32_t* words, int shift, int mask) {
    const __m512i shifted = _mm512_srlv_epi32(_mm512_loadu_si512(words), _mm512_set1_epi32(shift));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(mask)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
FQ_LANES Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
FQ_LANES Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
FQ_LANES Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
FQ_LANES Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FQ_LANES Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }

#elif defined(__AVX2__) && defined(__FMA__)

struct Floats {
  __m256 lo, hi;

  FQ_LANES Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  FQ_LANES Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  FQ_LANES __m256 half_field(const uint32_t* words, int shift, int mask) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i shifted = _mm256_srlv_epi32(all, _mm256_set1_epi32(shift));
    return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(mask)));
  }
  FQ_LANES Floats field(const uint32_t* words, int shift, int mask) {
    return {half_field(words, shift, mask), half_field(words + 8, shift, mask)};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
};
FQ_LANES Floats operator+(Floats a, Floats b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
FQ_LANES Floats operator-(Floats a, Floats b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
FQ_LANES Floats operator*(Floats a, Floats b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
FQ_LANES Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FQ_LANES Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

#else

struct Floats {
  float v[kLanes];

  template <class F>
  FQ_LANES Floats each(F f) {
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
  }
  FQ_LANES Floats load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  FQ_LANES Floats splat(float x) {
    return each([&](int) { return x; });
  }
  FQ_LANES Floats field(const uint32_t* words, int shift, int mask) {
    return each(
        [&](int i) { return static_cast<float>(static_cast<int32_t>(words[i] >> shift) & mask); });
  }
  void store(float* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = v[i];
  }
};
FQ_LANES Floats operator+(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] + b.v[i]; });
}
FQ_LANES Floats operator-(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] - b.v[i]; });
}
FQ_LANES Floats operator*(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] * b.v[i]; });
}
FQ_LANES Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return Floats::each([&](int i) { return fq::fma(a.v[i], b.v[i], c.v[i]); });
}
FQ_LANES Floats larger(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

#endif

#undef FQ_LANES

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

constexpr int64_t kWordBytes = 4;
constexpr int64_t kWordGroup = 8;  // words of a row that are transposed at a time

// words[w][lane] = word w of rows[lane] + first, xor flip; returns how many, at most kWordGroup.
// The last one may be partial: it is filled up with zeros, and no byte from `bytes` on is read.
inline int64_t transpose_words(const uint8_t* const* rows, int64_t first, int64_t bytes,
                               uint32_t flip, uint32_t (*words)[kLanes]) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "code 0 is in the lowest bits");
  const int64_t left = bytes - first;
  if (left >= kWordGroup * kWordBytes) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t w = 0; w < kWordGroup; ++w) {
        uint32_t word;
        __builtin_memcpy(&word, rows[lane] + first + w * kWordBytes, kWordBytes);
        words[w][lane] = word ^ flip;
      }
    return kWordGroup;
  }
  const int64_t count = (left + kWordBytes - 1) / kWordBytes;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t row[kWordGroup] = {};
    __builtin_memcpy(row, rows[lane] + first, static_cast<std::size_t>(left));
    for (int64_t w = 0; w < count; ++w) words[w][lane] = row[w] ^ flip;
  }
  return count;
}

template <int kWidth>
inline void unpack_words(const uint32_t (*words)[kLanes], int64_t count, Floats zero, float* out) {
  constexpr int kFields = 32 / kWidth;
  for (int64_t w = 0; w < count; ++w)
    for (int i = 0; i < kFields; ++i)
      (Floats::field(words[w], kWidth * i, (1 << kWidth) - 1) - zero)
          .store(out + (w * kFields + i) * kLanes);
}

// Codes of 16 rows (weights of 16 columns, 16 cached keys) as floats, transposed so that the rows
// are the lanes: out[i * 16 + lane] = float(code i of rows[lane]) - zero[lane].
//   width: 2, 4 or 8 bits a code. flip: 0, or the sign bit of every code in a word; with zero =
//   2^(width - 1) the codes are then signed. bytes: of a row. out has room for whole 32-bit words
//   of codes, and what is past the last code is finite.
inline void unpack_transposed(const uint8_t* const* rows, int64_t bytes, int width, uint32_t flip,
                              Floats zero, float* out) {
  alignas(64) uint32_t words[kWordGroup][kLanes];
  for (int64_t first = 0; first < bytes; first += kWordGroup * kWordBytes) {
    const int64_t count = transpose_words(rows, first, bytes, flip, words);
    if (width == 2)
      unpack_words<2>(words, count, zero, out);
    else if (width == 4)
      unpack_words<4>(words, count, zero, out);
    else
      unpack_words<8>(words, count, zero, out);
    out += count * (32 / width) * kLanes;
  }
}

}  // namespace
}  // namespace fq::cpu
