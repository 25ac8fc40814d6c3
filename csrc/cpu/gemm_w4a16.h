// The variants of gemm_w4a16.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void gemm_w4a16_avx2(const GemmW4A16& args, int64_t begin, int64_t end);
void gemm_w4a16_avx512(const GemmW4A16& args, int64_t begin, int64_t end);

}  // namespace fq::cpu
