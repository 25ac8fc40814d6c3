// The variants of fake_quantize and fake_quantize_backward; see ../ops.h.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void fake_quantize_avx2(const FakeQuantize& args, int64_t begin, int64_t end);
void fake_quantize_avx512(const FakeQuantize& args, int64_t begin, int64_t end);
void fake_quantize_backward_avx2(const FakeQuantizeBackward& args, int64_t begin, int64_t end,
                                 void* work);
void fake_quantize_backward_avx512(const FakeQuantizeBackward& args, int64_t begin, int64_t end,
                                   void* work);

}  // namespace fq::cpu
