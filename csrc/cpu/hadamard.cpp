// hadamard: rows times a Hadamard matrix, by butterflies. The portable variant and the choice.
#include "hadamard.h"

#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "hadamard_body.h"

}  // namespace

void hadamard(const Hadamard& args, int64_t begin, int64_t end) {
  float* const work = static_cast<float*>(scratch(4 * (2 * args.n + args.m * args.m)));
#if defined(__x86_64__)
  pick(&hadamard_rows, &hadamard_avx2, &hadamard_avx512)(args, begin, end, work);
#else
  hadamard_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
