// quantize_activation for AVX2 + FMA: the plain loops, compiled for it.
#include "quantize.h"

#include "lanes.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "row_codes.h"

#include "quantize_body.h"

}  // namespace

void quantize_activation_avx2(const QuantizeActivation& args, int64_t begin, int64_t end,
                              void* work) {
  quantize_rows(args, begin, end, work);
}

}  // namespace fq::cpu
