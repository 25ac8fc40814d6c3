// The integer GEMMs for AVX-512 with VNNI: vpdpbusd multiplies 64 pairs of bytes and adds
// them to 16 int32 sums, without saturation. The algorithm is in gemm_integer_simd.h. GCC 12 takes
// its own _mm512_undefined_* for an uninitialized variable (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "gemm_integer_simd.h"

namespace fq::cpu {
namespace {

struct Vnni {
  static constexpr int64_t kBytes = 64;
  static constexpr int kRows = 4;  // 16 sums, 8 activations and 4 temporaries in 32 registers
  using Bytes = __m512i;
  using Sums = __m512i;

  static Sums zero() { return _mm512_setzero_si512(); }
  static Bytes load(const void* p) { return _mm512_loadu_si512(p); }
  static Bytes load_first(const void* p, int64_t count) {
    return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), p);
  }
  static Bytes low(Bytes w) {  // (w ^ 8) & 15 per byte: 0x28 is the truth table of (a ^ b) & c
    return _mm512_ternarylogic_epi32(w, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28);
  }
  static Bytes high(Bytes w) { return low(_mm512_srli_epi16(w, 4)); }
  static Sums add_products(Sums sums, Bytes low, Bytes even, Bytes high, Bytes odd) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, low, even), high, odd);
  }
  static constexpr uint32_t kByteOffset = 128;
  static Sums add_products(Sums sums, Bytes w, Bytes a) {
    return _mm512_dpbusd_epi32(sums, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), a);
  }
  // Four sums of 16 numbers each, by two rounds of transpose and add.
  static void store_totals(int32_t* out, Sums a, Sums b, Sums c, Sums d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i abcd =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i halves =
        _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    const __m128i total =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), total);
  }
};

}  // namespace

void gemm_w4a4_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 4, 4>(args, begin, end);
}

void gemm_w4a8_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 8, 4>(args, begin, end);
}

void gemm_w8a8_avx512(const GemmInteger& args, int64_t begin, int64_t end) {
  gemm_simd<Vnni, 8, 8>(args, begin, end);
}

}  // namespace fq::cpu
