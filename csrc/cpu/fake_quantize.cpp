// fake_quantize and its gradient, used while calibrating: the portable variants and the choice.
#include "fake_quantize.h"

#include "pick.h"
#include "scratch.h"

namespace fq::cpu {
namespace {

#include "row_body.h"

#include "fake_quantize_body.h"

}  // namespace

void fake_quantize(const FakeQuantize& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  pick(&fake_quantize_rows, &fake_quantize_avx2, &fake_quantize_avx512)(args, begin, end);
#else
  fake_quantize_rows(args, begin, end);
#endif
}

void fake_quantize_backward(const FakeQuantizeBackward& args, int64_t begin, int64_t end) {
  void* const work = scratch(args.k * 4);
#if defined(__x86_64__)
  pick(&fake_quantize_backward_rows, &fake_quantize_backward_avx2, &fake_quantize_backward_avx512)(
      args, begin, end, work);
#else
  fake_quantize_backward_rows(args, begin, end, work);
#endif
}

}  // namespace fq::cpu
