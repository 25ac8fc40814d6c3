// Packed codes and rows of activations as a matrix unit multiplies them, in bfloat16: by fields of
// 16-bit words. See gemm_w4a16.h.
#pragma once

#include <cstdint>

#include "gemm_panels.h"
#include "quads.h"

namespace fq::cpu {
namespace {

// The bfloat16 of a code, by the lowest five bits of a word.
template <int kWidth>
struct CodeTable {
  alignas(64) uint16_t values[32] = {};

  constexpr CodeTable() {
    constexpr uint16_t kMagnitudes[] = {0,      0x3f80, 0x4000, 0x4040, 0x4080,
                                        0x40a0, 0x40c0, 0x40e0, 0x4100};  // 0..8
    constexpr int kSign = 1 << (kWidth - 1);
    for (int i = 0; i < 32; ++i) {
      const int code = ((i & (2 * kSign - 1)) ^ kSign) - kSign;
      values[i] = code < 0 ? kMagnitudes[-code] | 0x8000 : kMagnitudes[code];
    }
  }
};
template <int kWidth>
constexpr CodeTable<kWidth> kCodes;

// The codes in one field of 32 words.
template <int kWidth>
inline __m512i codes_of(__m512i words, int field) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, static_cast<unsigned>(kWidth * field)),
                                  _mm512_load_si512(kCodes<kWidth>.values));
}

// Numbers [first, first + 32) of x, 0 from `end` on.
inline __m512i load_some(const uint16_t* x, int64_t first, int64_t end) {
  const int64_t left = end - first;
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1 : ~0u, x + first);
}

// From kFields vectors of consecutive numbers to those of every field: those whose index is j
// modulo kFields, for all j. Evens and odds are told apart as often as kFields has a factor 2.
template <int64_t kFields>
inline void split_fields(__m512i (&v)[kFields]) {
  alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                     22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                     44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i even = _mm512_load_si512(kEven);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t done = 1; done < kFields; done *= 2) {
    // v[i] holds the numbers that are i % done modulo done, of the (i / done)-th stretch.
    __m512i next[kFields];
    for (int64_t i = 0; i < kFields; i += 2 * done)
      for (int64_t j = 0; j < done; ++j) {
        const __m512i a = v[i + j], b = v[i + done + j];
        next[i + j] = _mm512_permutex2var_epi16(a, even, b);
        next[i + done + j] = _mm512_permutex2var_epi16(a, odd, b);
      }
    for (int64_t i = 0; i < kFields; ++i) v[i] = next[i];
  }
}

// The pairs of one row, to every count-th place.
inline void store_pairs(__m512i pairs, int64_t count, uint8_t* out) {
  if (count == 1) return _mm512_storeu_si512(out, pairs);
  alignas(64) uint32_t pair[kHalf];
  _mm512_store_si512(pair, pairs);
  for (int64_t i = 0; i < kHalf; ++i, out += count * 4) __builtin_memcpy(out, pair + i, 4);
}

}  // namespace
}  // namespace fq::cpu
