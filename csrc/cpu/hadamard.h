// The variants of hadamard. `work` is what hadamard_body.h asks for.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void hadamard_avx2(const Hadamard& args, int64_t begin, int64_t end, float* work);
void hadamard_avx512(const Hadamard& args, int64_t begin, int64_t end, float* work);

}  // namespace fq::cpu
