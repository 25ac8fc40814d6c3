// The integer GEMMs for AVX2: vpmaddubsw adds pairs of unsigned x signed products in int16. With
// weights below 16, four of them together are at most 4 * 15 * 128, so nothing saturates; weights
// of 8 bits are multiplied in two halves of 4. See gemm_integer_simd.h.
#include "gemm_integer_simd.h"

namespace fq::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kColumns = 8;
  static constexpr int64_t kFewRows = 4;
  static constexpr int64_t kPanelSteps = 12;  // 24 KB: most of the L1 cache
  static constexpr int kRows = 4;             // 8 sums, 4 weights and 4 others in 16 registers
  using Bytes = __m256i;
  using Sums = __m256i;

  static Sums zero() { return _mm256_setzero_si256(); }
  static Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Sums load_sums(const void* p) { return load(p); }
  static void store(void* p, Bytes b) { _mm256_storeu_si256(static_cast<__m256i*>(p), b); }
  static void store_sums(void* p, Sums s) { store(p, s); }
  static Bytes broadcast(const void* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm256_set1_epi32(quad);
  }
  static Bytes nibbles(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
  static Bytes low(Bytes w) { return nibbles(_mm256_xor_si256(w, _mm256_set1_epi8(8))); }
  static Bytes high(Bytes w) { return low(_mm256_srli_epi16(w, 4)); }
  static Bytes flip(Bytes w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
  static Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static Sums add_pairs(Sums sums, __m256i pairs, int16_t factor) {
    return add(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)));
  }
  static int32_t total(Sums sums) {
    alignas(32) int32_t sum[8];
    store(sum, sums);
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  }

  // One step of a row, and its sum.
  template <int kActivationBits, int kWeightBits>
  static Sums prepare_step(const uint8_t* codes, int flip, uint8_t* out, Sums sum) {
    const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip)), first = load(codes);
    __m256i a0, a1;
    if (kActivationBits == 4) {
      a0 = _mm256_sub_epi8(_mm256_xor_si256(nibbles(first), flips), flips);
      a1 = nibbles(_mm256_srli_epi16(first, 4));
      a1 = _mm256_sub_epi8(_mm256_xor_si256(a1, flips), flips);
    } else {
      a0 = _mm256_xor_si256(first, flips);
      a1 = _mm256_xor_si256(load(codes + 32), flips);
      if (kWeightBits == 4) {
        const __m256i even = _mm256_set1_epi16(255);
        const auto join = [](__m256i x, __m256i y) {
          return _mm256_permute4x64_epi64(_mm256_packus_epi16(x, y), 0xd8);
        };
        const __m256i evens = join(_mm256_and_si256(a0, even), _mm256_and_si256(a1, even));
        a1 = join(_mm256_srli_epi16(a0, 8), _mm256_srli_epi16(a1, 8));
        a0 = evens;
      }
    }
    store(out, a0);
    store(out + 32, a1);
    const __m256i one = _mm256_set1_epi8(1);
    return add_pairs(
        sum, _mm256_add_epi16(_mm256_maddubs_epi16(one, a0), _mm256_maddubs_epi16(one, a1)), 1);
  }

  struct Step {
    Bytes first, second;
  };
  static Step load_row_step(const uint8_t* a) { return {load(a), load(a + 32)}; }
  template <int kWeightBits>
  static Step load_step(const uint8_t* w) {
    const __m256i bytes = load(w);
    if (kWeightBits == 4) return {low(bytes), high(bytes)};
    return {flip(bytes), flip(load(w + 32))};
  }
  template <int kWeightBits>
  static Sums add_step(Sums sums, Step w, Step a) {
    return add_products<kWeightBits>(sums, w.first, a.first, w.second, a.second);
  }
  static void store_totals(int32_t* out, const Sums (&s)[4]) {
    const __m256i abcd =
        _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    const __m128i total =
        _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), total);
  }

  template <int kWeightBits>
  static Sums add_products(Sums sums, Bytes w0, Bytes a0, Bytes w1, Bytes a1) {
    if (kWeightBits == 4)
      return add_pairs(
          sums, _mm256_add_epi16(_mm256_maddubs_epi16(w0, a0), _mm256_maddubs_epi16(w1, a1)), 1);
    const auto half = [&](Bytes x0, Bytes x1) {
      return _mm256_add_epi16(_mm256_maddubs_epi16(nibbles(x0), a0),
                              _mm256_maddubs_epi16(nibbles(x1), a1));
    };
    sums = add_pairs(sums, half(w0, w1), 1);
    return add_pairs(sums, half(_mm256_srli_epi16(w0, 4), _mm256_srli_epi16(w1, 4)), 16);
  }

  template <int kWeightBits, class Aside>
  static void multiply_block(const Block& block, Aside&) {
    multiply_vectors<Avx2, kWeightBits>(block);
  }
};

}  // namespace

void gemm_w4a4_avx2(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Avx2, 4, 4>(args, begin, end);
}

void gemm_w4a8_avx2(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Avx2, 8, 4>(args, begin, end);
}

void gemm_w8a8_avx2(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Avx2, 8, 8>(args, begin, end);
}

}  // namespace fq::cpu
