// The variants of quantize_activation. `work` is what quantize_body.h asks for.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void quantize_activation_avx2(const QuantizeActivation& args, int64_t begin, int64_t end,
                              void* work);
void quantize_activation_avx512(const QuantizeActivation& args, int64_t begin, int64_t end,
                                void* work);

}  // namespace fq::cpu
