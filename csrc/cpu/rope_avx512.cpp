// Rotary position embedding for AVX-512: the plain loops, compiled for it.
#include "rope.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "rope_body.h"

}  // namespace

void rope_avx512(const Rope& args, int64_t begin, int64_t end, float* work) {
  rope_rows(args, begin, end, work);
}

}  // namespace fq::cpu
