// The variants of kronecker and kronecker_quantize. `work` is what kronecker_body.h asks for.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void kronecker_avx2(const Kronecker& args, int64_t begin, int64_t end, float* work);
void kronecker_avx512(const Kronecker& args, int64_t begin, int64_t end, float* work);
void kronecker_amx(const Kronecker& args, int64_t begin, int64_t end, float* work);
void kronecker_quantize_avx2(const KroneckerQuantize& args, int64_t begin, int64_t end,
                             float* work);
void kronecker_quantize_avx512(const KroneckerQuantize& args, int64_t begin, int64_t end,
                               float* work);
void kronecker_quantize_amx(const KroneckerQuantize& args, int64_t begin, int64_t end, float* work);

}  // namespace fq::cpu
