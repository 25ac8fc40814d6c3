// gemm_w4a16: out [m, n] = x [m, k] (codes [n, k] * w_scale [n, groups])^T (+ bias), x float32,
// bfloat16 or float16, codes of 2, 3 or 4 bits. What its variants share: the cut into tiles, and
// the order of the additions, so that all of them give the same bits.
//
// A segment is at most 512 k of one group, counted from its start. A line is 64 bytes of its packed
// codes, 32 words of 16 bits; part j of a line is the code in field j of every word (four fields of
// 4 bits, or eight of 2): code j of the first word, code j of the second .. Per output:
//
//   even = over the even words of a part, ascending:   even = fma(x[k], code[k], even), from 0
//   odd = likewise over its odd words
//   sum = over the parts of all lines of a segment, ascending:   sum = sum + (even + odd), from 0
//   total = over all segments:                total = fma(sum, w_scale[group], total), from 0
//   out = round_T(total + bias)
//
// That is what one instruction of a matrix unit computes for a part, in bfloat16, and what is
// unpacked fastest. Error, with e = 2^-24 (float32's half ulp), S = sum_k |x_k w_k|, w = code *
// scale:
//   |total - exact| <= (min(g / 8 + 1, 16) + 1 + min(g, 16) + segments) e S (1 + small), g = k /
//   groups,
// with at most groups + k / 512 segments; then one rounding of the bias addition and one to T.
#pragma once

#include "../ops.h"
#include "gemm_tiles.h"
#include "pick.h"

namespace fq::cpu {

void gemm_w4a16_avx2(const GemmW4A16& args, int64_t begin, int64_t end);
void gemm_w4a16_avx512(const GemmW4A16& args, int64_t begin, int64_t end);
void gemm_w4a16_amx(const GemmW4A16& args, int64_t begin, int64_t end);

namespace {

constexpr int64_t kSegment = 512;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPart = 32;  // codes

// By panels, rows are kept in bfloat16, and used a chunk at a time; else as float32, and all of
// them should stay in the L2 cache.
inline Tiling tiling(const GemmW4A16& args) {
  const bool by_panels = args.dtype == Dtype::kBFloat16 && isa() >= Isa::kAmx;
  return Tiling(args.m, args.n, args.k * (by_panels ? 2 : 8));
}

// Bits that a code takes: 3 are stored as 4.
inline int width_of(const GemmW4A16& args) { return args.bits == 2 ? 2 : 4; }
inline int64_t group_of(const GemmW4A16& args) {
  return args.groups > 0 && args.k > 0 ? args.k / args.groups : 1;
}

}  // namespace
}  // namespace fq::cpu
