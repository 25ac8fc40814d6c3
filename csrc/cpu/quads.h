// Weights lie column by column in memory; vectors want the same few k of many columns. A quad is
// four bytes of a column. load_quads reads 16 bytes each of as many columns as a vector has quads,
// and transposes: quads[j] = quad j of every column. Four columns are put side by side, 128 bits
// each, by the loads themselves; what is left is a transpose within 128 bits.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 takes its own _mm512_undefined_* for an uninitialized variable (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

#if defined(__AVX2__)

inline __m128i load_piece(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Of 8 columns.
inline void load_quads(const uint8_t* const* columns, int64_t offset, __m256i (&quads)[4]) {
  __m256i v[4];  // v[i]: columns i and i + 4
  for (int i = 0; i < 4; ++i)
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_piece(columns[i] + offset)),
                                   load_piece(columns[i + 4] + offset), 1);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  quads[0] = _mm256_unpacklo_epi64(a, c);
  quads[1] = _mm256_unpackhi_epi64(a, c);
  quads[2] = _mm256_unpacklo_epi64(b, d);
  quads[3] = _mm256_unpackhi_epi64(b, d);
}

#endif
#if defined(__AVX512F__)

// Of 16 columns.
inline void load_quads(const uint8_t* const* columns, int64_t offset, __m512i (&quads)[4]) {
  __m512i v[4];  // v[i]: columns i, i + 4, i + 8 and i + 12
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castsi128_si512(load_piece(columns[i] + offset));
    v[i] = _mm512_inserti32x4(v[i], load_piece(columns[i + 4] + offset), 1);
    v[i] = _mm512_inserti32x4(v[i], load_piece(columns[i + 8] + offset), 2);
    v[i] = _mm512_inserti32x4(v[i], load_piece(columns[i + 12] + offset), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  quads[0] = _mm512_unpacklo_epi64(a, c);
  quads[1] = _mm512_unpackhi_epi64(a, c);
  quads[2] = _mm512_unpacklo_epi64(b, d);
  quads[3] = _mm512_unpackhi_epi64(b, d);
}

#endif

}  // namespace
}  // namespace fq::cpu
