// What the variants of the integer GEMMs share: the cut into tiles; the epilogue is in
// gemm_finish.h. They differ in how they find the integer sum_k a w; it is exact, so all of them
// agree bit for bit.
#pragma once

#include "../ops.h"
#include "gemm_finish.h"
#include "gemm_tiles.h"

namespace fq::cpu {

void gemm_w4a4_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a4_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a4_amx(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w4a8_amx(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx2(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_avx512(const GemmInteger& args, int64_t begin, int64_t end);
void gemm_w8a8_amx(const GemmInteger& args, int64_t begin, int64_t end);

namespace {

// Rows are prepared as one byte a code.
inline Tiling tiling(const GemmInteger& args) { return Tiling(args.m, args.n, args.k); }

}  // namespace
}  // namespace fq::cpu
