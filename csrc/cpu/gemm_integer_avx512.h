// The instructions of AVX-512 with VNNI that gemm_integer_simd.h asks for: vpdpbusd multiplies 64
// pairs of bytes and adds them to 16 int32 sums, without saturation.
#pragma once

#include "gemm_integer_simd.h"

namespace fq::cpu {
namespace {

struct Vnni {
  static constexpr int64_t kColumns = 16;
  static constexpr int64_t kFewRows = 8;
  static constexpr int64_t kPanelSteps = 12;  // 24 KB: half of the L1 cache
  static constexpr int kRows = 8;  // 16 sums, 4 weights, the activations come from memory
  using Bytes = __m512i;
  using Sums = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }
  static Bytes load(const void* p) { return _mm512_loadu_si512(p); }
  static Sums load_sums(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Bytes b) { _mm512_storeu_si512(p, b); }
  static void store_sums(void* p, Bytes b) { _mm512_storeu_si512(p, b); }
  static Bytes broadcast(const void* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm512_set1_epi32(quad);
  }
  static Bytes low(Bytes w) {  // (w ^ 8) & 15 per byte: 0x28 is the truth table of (a ^ b) & c
    return _mm512_ternarylogic_epi32(w, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28);
  }
  static Bytes high(Bytes w) { return low(_mm512_srli_epi16(w, 4)); }
  static Bytes flip(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }

  // 64 codes of 4 bits: those of even k in the lower half, of odd k in the upper one.
  static Bytes spread(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shift);
  }

  // One step of a row, and its sum.
  template <int kActivationBits, int kWeightBits>
  static Sums prepare_step(const uint8_t* codes, int flip, uint8_t* out, Sums sum) {
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    __m512i a;
    if (kActivationBits == 4) {  // (code & 15 ^ flip) - flip
      a = _mm512_ternarylogic_epi32(spread(codes), _mm512_set1_epi8(15), flips, 0x6a);
      a = _mm512_sub_epi8(a, flips);
    } else {
      a = _mm512_xor_si512(load(codes), flips);
      if (kWeightBits == 4)
        a = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)),
                               _mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), 1);
    }
    store(out, a);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), a);
  }

  // One step of a row, or of a column.
  using Step = __m512i;
  static Step load_row_step(const uint8_t* a) { return load(a); }
  template <int kWeightBits>
  static Step load_step(const uint8_t* w) {
    return kWeightBits == 4 ? low(spread(w)) : flip(load(w));
  }
  template <int kWeightBits>
  static Sums add_step(Sums sums, Step w, Step a) {
    return _mm512_dpbusd_epi32(sums, w, a);
  }
  // Four sums of 16 numbers each, by two rounds of transpose and add.
  static void store_totals(int32_t* out, const Sums (&s)[4]) {
    const auto fold = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i ab = fold(s[0], s[1]), cd = fold(s[2], s[3]);
    const __m512i abcd =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i halves =
        _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    const __m128i total =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), total);
  }

  template <int kWeightBits>
  static Sums add_products(Sums sums, Bytes w0, Bytes a0, Bytes w1, Bytes a1) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, w0, a0), w1, a1);
  }

  template <int kWeightBits, class Aside>
  static void multiply_block(const Block& block, Aside&) {
    multiply_vectors<Vnni, kWeightBits>(block);
  }
};

}  // namespace
}  // namespace fq::cpu
