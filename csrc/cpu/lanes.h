// Sixteen numbers at a time, on any instruction set: one AVX-512 register, two AVX registers or an
// array. Floats hold float32, Bits the same as uint32. Every operation is one IEEE or integer
// operation per lane, so a kernel written with them gives the same bits in every file that compiles
// it. larger(a, b) is a > b ? a : b: b if one is NaN; smaller likewise. Sums over the lanes have
// one order: halves are folded onto each other, 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../contract.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
// GCC 12 takes its own _mm512_undefined_* for an uninitialized variable (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

using fq::fma;  // next to the one for sixteen floats

constexpr int kLanes = 16;

#define FQ_LANES static inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int kFloatRegisters = 32;  // of Floats

struct Bits {
  __m512i v;

  FQ_LANES Bits load(const void* p) { return {_mm512_loadu_si512(p)}; }
  FQ_LANES Bits splat(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  FQ_LANES Bits widen(const uint8_t* p) {  // sixteen bytes
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  template <int kBits>
  Bits left() const {
    return {_mm512_slli_epi32(v, kBits)};
  }
  template <int kBits>
  Bits right() const {
    return {_mm512_srli_epi32(v, kBits)};
  }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
  void store_bytes(uint8_t* p) const {  // the lowest ones
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
};
FQ_LANES Bits operator+(Bits a, Bits b) { return {_mm512_add_epi32(a.v, b.v)}; }
FQ_LANES Bits operator&(Bits a, Bits b) { return {_mm512_and_si512(a.v, b.v)}; }
FQ_LANES Bits operator|(Bits a, Bits b) { return {_mm512_or_si512(a.v, b.v)}; }

struct Floats {
  __m512 v;

  FQ_LANES Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FQ_LANES Floats splat(float x) { return {_mm512_set1_ps(x)}; }
  FQ_LANES Floats of(Bits w) { return {_mm512_castsi512_ps(w.v)}; }
  Bits bits() const { return {_mm512_castps_si512(v)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  float largest() const { return _mm512_reduce_max_ps(v); }  // without a NaN
};
FQ_LANES Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
FQ_LANES Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
FQ_LANES Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
FQ_LANES Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
FQ_LANES Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FQ_LANES Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
FQ_LANES Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
// x < bound ? less : other
FQ_LANES Floats where_less(Floats x, Floats bound, Floats less, Floats other) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), other.v, less.v)};
}
// x == y ? equal : other
FQ_LANES Floats where_equal(Floats x, Floats y, Floats equal, Floats other) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_EQ_OQ), other.v, equal.v)};
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kFloatRegisters = 8;  // of Floats

struct Bits {
  __m256i lo, hi;

  FQ_LANES __m256i half(const void* p, int i) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p) + i);
  }
  FQ_LANES Bits load(const void* p) { return {half(p, 0), half(p, 1)}; }
  FQ_LANES Bits splat(uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {all, all};
  }
  FQ_LANES Bits widen(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  }
  template <int kBits>
  Bits left() const {
    return {_mm256_slli_epi32(lo, kBits), _mm256_slli_epi32(hi, kBits)};
  }
  template <int kBits>
  Bits right() const {
    return {_mm256_srli_epi32(lo, kBits), _mm256_srli_epi32(hi, kBits)};
  }
  void store(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, hi);
  }
  void store_bytes(uint8_t* p) const {  // the lowest ones
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i pairs =  // lanes 0-3, 8-11, 4-7, 12-15
        _mm256_packus_epi32(_mm256_and_si256(lo, byte), _mm256_and_si256(hi, byte));
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
};
FQ_LANES Bits operator+(Bits a, Bits b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
FQ_LANES Bits operator&(Bits a, Bits b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
FQ_LANES Bits operator|(Bits a, Bits b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}

struct Floats {
  __m256 lo, hi;

  FQ_LANES Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  FQ_LANES Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  FQ_LANES Floats of(Bits w) { return {_mm256_castsi256_ps(w.lo), _mm256_castsi256_ps(w.hi)}; }
  Bits bits() const { return {_mm256_castps_si256(lo), _mm256_castps_si256(hi)}; }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  float sum() const {
    const __m256 eight = _mm256_add_ps(lo, hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  float largest() const {
    const __m256 eight = _mm256_max_ps(lo, hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
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
FQ_LANES Floats operator/(Floats a, Floats b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
FQ_LANES Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FQ_LANES Floats larger(Floats a, Floats b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
FQ_LANES Floats smaller(Floats a, Floats b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
FQ_LANES Floats where_less(Floats x, Floats bound, Floats less, Floats other) {
  return {_mm256_blendv_ps(other.lo, less.lo, _mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(other.hi, less.hi, _mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ))};
}
FQ_LANES Floats where_equal(Floats x, Floats y, Floats equal, Floats other) {
  return {_mm256_blendv_ps(other.lo, equal.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_EQ_OQ)),
          _mm256_blendv_ps(other.hi, equal.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_EQ_OQ))};
}

#else

constexpr int kFloatRegisters = 4;  // of Floats, more or less

template <class T>
struct Sixteen {
  T v[kLanes];

  template <class F>
  FQ_LANES Sixteen each(F f) {
    Sixteen out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
  }
  FQ_LANES Sixteen load(const void* p) {
    Sixteen out;
    __builtin_memcpy(out.v, p, sizeof out.v);
    return out;
  }
  FQ_LANES Sixteen splat(T x) {
    return each([&](int) { return x; });
  }
  void store(void* p) const { __builtin_memcpy(p, v, sizeof v); }
};

struct Bits : Sixteen<uint32_t> {
  Bits(const Sixteen<uint32_t>& w) : Sixteen<uint32_t>(w) {}
  FQ_LANES Bits widen(const uint8_t* p) {
    return each([&](int i) { return uint32_t{p[i]}; });
  }
  template <int kBits>
  Bits left() const {
    return each([&](int i) { return v[i] << kBits; });
  }
  template <int kBits>
  Bits right() const {
    return each([&](int i) { return v[i] >> kBits; });
  }
  void store_bytes(uint8_t* p) const {  // the lowest ones
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
  }
};
FQ_LANES Bits operator+(const Bits& a, const Bits& b) {
  return Bits::each([&](int i) { return a.v[i] + b.v[i]; });
}
FQ_LANES Bits operator&(const Bits& a, const Bits& b) {
  return Bits::each([&](int i) { return a.v[i] & b.v[i]; });
}
FQ_LANES Bits operator|(const Bits& a, const Bits& b) {
  return Bits::each([&](int i) { return a.v[i] | b.v[i]; });
}

struct Floats : Sixteen<float> {
  Floats() = default;
  Floats(const Sixteen<float>& f) : Sixteen<float>(f) {}
  FQ_LANES Floats of(const Bits& w) { return load(w.v); }
  Bits bits() const { return Bits::load(v); }
  float sum() const {
    float s[kLanes];
    store(s);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
    return s[0];
  }
  float largest() const {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
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
FQ_LANES Floats operator/(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] / b.v[i]; });
}
FQ_LANES Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return Floats::each([&](int i) { return fq::fma(a.v[i], b.v[i], c.v[i]); });
}
FQ_LANES Floats larger(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
FQ_LANES Floats smaller(const Floats& a, const Floats& b) {
  return Floats::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
FQ_LANES Floats where_less(const Floats& x, const Floats& bound, const Floats& less,
                           const Floats& other) {
  return Floats::each([&](int i) { return x.v[i] < bound.v[i] ? less.v[i] : other.v[i]; });
}
FQ_LANES Floats where_equal(const Floats& x, const Floats& y, const Floats& equal,
                            const Floats& other) {
  return Floats::each([&](int i) { return x.v[i] == y.v[i] ? equal.v[i] : other.v[i]; });
}

#endif

FQ_LANES Floats zeros() { return Floats::splat(0.0f); }

// round_T(x) for bfloat16; the low half of a NaN's bits must be 0.
FQ_LANES Floats round_bf16(Floats x) {
  const Bits bits = x.bits(), odd = bits.right<16>() & Bits::splat(1);
  return Floats::of((bits + Bits::splat(0x7fff) + odd) & Bits::splat(0xffff0000u));
}

#undef FQ_LANES

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <int kCount>
struct Constant {
  static constexpr int value = kCount;
};

// Calls f with Constant 0 .. kCount - 1: a loop whose index is a constant.
template <int kCount, class F>
inline __attribute__((always_inline)) void unrolled(F f) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(f);
    f(Constant<kCount - 1>());
  }
}

}  // namespace
}  // namespace fq::cpu
