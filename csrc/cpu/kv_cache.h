// The variants of kv_quantize_append and kv_dequantize.
#pragma once

#include "../ops.h"

namespace fq::cpu {

void kv_quantize_append_avx2(const KvQuantizeAppend& args, int64_t begin, int64_t end);
void kv_quantize_append_avx512(const KvQuantizeAppend& args, int64_t begin, int64_t end);
void kv_dequantize_avx2(const KvDequantize& args, int64_t begin, int64_t end);
void kv_dequantize_avx512(const KvDequantize& args, int64_t begin, int64_t end);

}  // namespace fq::cpu
