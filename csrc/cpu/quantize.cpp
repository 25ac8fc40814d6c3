// quantize_activation: rows of floats to codes (contract.h), the portable variant and the choice.
#include "quantize.h"

#include "lanes.h"

#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "row_codes.h"

#include "quantize_body.h"

}  // namespace

void quantize_activation(const QuantizeActivation& args, int64_t begin, int64_t end) {
  void* const work = scratch(args.k * 4 + args.k + 1);
#if defined(__x86_64__)
  pick(&quantize_rows, &quantize_activation_avx2, &quantize_activation_avx512)(args, begin, end,
                                                                               work);
#else
  quantize_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
