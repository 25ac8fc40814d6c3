// fake_quantize and its gradient for AVX2: the plain loops, compiled for it.
#include "fake_quantize.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "fake_quantize_body.h"

}  // namespace

void fake_quantize_avx2(const FakeQuantize& args, int64_t begin, int64_t end) {
  fake_quantize_rows(args, begin, end);
}

void fake_quantize_backward_avx2(const FakeQuantizeBackward& args, int64_t begin, int64_t end,
                                 void* work) {
  fake_quantize_backward_rows(args, begin, end, work);
}

}  // namespace fq::cpu
