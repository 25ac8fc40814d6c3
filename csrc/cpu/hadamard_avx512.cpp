// hadamard for AVX-512: the plain loops, compiled for it.
#include "hadamard.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "hadamard_body.h"

}  // namespace

void hadamard_avx512(const Hadamard& args, int64_t begin, int64_t end, float* work) {
  hadamard_rows(args, begin, end, work);
}

}  // namespace fq::cpu
