// The output head of a model in bfloat16, for few rows: out = round_T(x w^T + bias), T = bfloat16.
//
// The products of bfloat16 numbers are exact in float32, and their sum has one order on every
// instruction set, in any batch: 16 lanes of even k and 16 of odd k, lane i taking the pairs
// k = 32 j + 2 i, j ascending, by fma; then even + odd, and the lanes folded in halves.
//
// Bound: the memory that w comes from, which is read once for all rows.
#pragma once

#include "../ops.h"

namespace fq::cpu {

struct Head {
  const uint16_t* x;     // [rows, k]
  const uint16_t* w;     // [n, k]
  const uint16_t* bias;  // [n], optional
  uint16_t* out;         // [rows, n]
  int64_t rows, n, k;
};

constexpr int64_t kHeadColumns = 16;  // of w, a unit of begin and end

inline int64_t head_units(const Head& args) { return (args.n + kHeadColumns - 1) / kHeadColumns; }

// begin, end: units.
void head(const Head& args, int64_t begin, int64_t end);
void head_avx2(const Head& args, int64_t begin, int64_t end);
void head_avx512(const Head& args, int64_t begin, int64_t end);

}  // namespace fq::cpu
