// Rotary position embedding: the portable variant and the choice.
#include "rope.h"

#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "rope_body.h"

}  // namespace

void rope(const Rope& args, int64_t begin, int64_t end) {
  float* const work = static_cast<float*>(scratch(4 * args.head_dim));
#if defined(__x86_64__)
  pick(&rope_rows, &rope_avx2, &rope_avx512)(args, begin, end, work);
#else
  rope_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
