// The variants of attention_decode.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void attention_decode_avx2(const AttentionDecode& args, int64_t begin, int64_t end);
void attention_decode_avx512(const AttentionDecode& args, int64_t begin, int64_t end);
void attention_decode_amx(const AttentionDecode& args, int64_t begin, int64_t end);

}  // namespace fq::cpu
