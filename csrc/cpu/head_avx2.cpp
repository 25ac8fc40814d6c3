// The output head for AVX2. See head_body.h.
#include "head.h"

#include "lanes.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "head_body.h"

}  // namespace

void head_avx2(const Head& args, int64_t begin, int64_t end) { head_body(args, begin, end); }

}  // namespace fq::cpu
