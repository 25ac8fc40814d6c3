// The output head: the portable variant and the choice. See head_body.h.
#include "head.h"

#include "lanes.h"
#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "head_body.h"

}  // namespace

void head(const Head& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&head_body, &head_avx2, &head_avx512)(args, begin, end);
#else
  head_body(args, begin, end);
#endif
}

}  // namespace fq::cpu
