// The integer GEMMs for AVX2: vpmaddubsw adds pairs of unsigned x signed products in int16.
// Four of them together are at most 4 * 15 * 128, so nothing saturates. See gemm_integer_simd.h.
#include <immintrin.h>

#include "gemm_integer_simd.h"

namespace fq::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kBytes = 32;
  static constexpr int kRows = 2;  // 8 sums, 4 activations and 4 temporaries in 16 registers
  using Bytes = __m256i;
  using Sums = __m256i;

  static Sums zero() { return _mm256_setzero_si256(); }
  static Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Bytes load_first(const void* p, int64_t count) {
    alignas(32) uint8_t bytes[32] = {};
    __builtin_memcpy(bytes, p, static_cast<size_t>(count));
    return load(bytes);
  }
  static Bytes low(Bytes w) {
    return _mm256_and_si256(_mm256_xor_si256(w, _mm256_set1_epi8(8)), _mm256_set1_epi8(15));
  }
  static Bytes high(Bytes w) { return low(_mm256_srli_epi16(w, 4)); }
  static Sums add_products(Sums sums, Bytes low, Bytes even, Bytes high, Bytes odd) {
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // Pairs of such products could leave int16 (255 * 128 * 2): these are widened first instead.
  static constexpr uint32_t kByteOffset = 0;
  static Sums add_products(Sums sums, Bytes w, Bytes a) {
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)),
                                          _mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)));
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1)),
                                           _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1)));
    return _mm256_add_epi32(sums, _mm256_add_epi32(low, high));
  }
  static void store_totals(int32_t* out, Sums a, Sums b, Sums c, Sums d) {
    const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i total =
        _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), total);
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
