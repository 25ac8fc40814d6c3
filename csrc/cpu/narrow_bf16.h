// bfloat16 in vectors. The instruction that rounds two vectors of float to one of bfloat16 takes
// subnormal numbers for 0 and keeps the payload of a NaN: where there is either, round_to_bf16 does
// nothing and returns false.
#pragma once

#include "gemm_tiles.h"

#if defined(__AVX512BF16__)
// GCC 12 takes its own _mm512_undefined_* for an uninitialized variable (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

static_assert(kTileColumns == 32, "two vectors of float, one of bfloat16");

#if defined(__AVX512BF16__)

constexpr bool kVectorsRoundToBf16 = true;

inline bool round_to_bf16(__m512 a, __m512 b, __m512i& both) {
  constexpr int kSubnormalOrNan = 0xa1;
  if (_mm512_fpclass_ps_mask(a, kSubnormalOrNan) | _mm512_fpclass_ps_mask(b, kSubnormalOrNan))
    return false;
  both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return true;
}

// Half 0 or 1 of a vector of bfloat16.
template <int kIndex>
inline __m512 widen_bf16(__m512i both) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, kIndex));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#else

constexpr bool kVectorsRoundToBf16 = false;

#endif

}  // namespace
}  // namespace fq::cpu
