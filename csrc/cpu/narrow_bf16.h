// One row of a tile, rounded to bfloat16.
#pragma once

#include "gemm_tiles.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fq::cpu {
namespace {

// Rounds a row of a whole tile to bfloat16 in one instruction, which however takes subnormal
// numbers for 0 and keeps the payload of a NaN; false, and nothing done, if there is either.
inline bool narrow_to_bf16(const float* out, void* row) {
#if defined(__AVX512BF16__)
  static_assert(kTileColumns == 32, "two vectors of float, one of bfloat16");
  constexpr int kSubnormalOrNan = 0xa1;
  const __m512 a = _mm512_loadu_ps(out), b = _mm512_loadu_ps(out + 16);
  if (_mm512_fpclass_ps_mask(a, kSubnormalOrNan) | _mm512_fpclass_ps_mask(b, kSubnormalOrNan))
    return false;
  const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
  __builtin_memcpy(row, &both, sizeof both);
  return true;
#else
  static_cast<void>(out), static_cast<void>(row);
  return false;
#endif
}

}  // namespace
}  // namespace fq::cpu
